// Shares sequences out over data-parallel replicas and packed rows, for batches where Python is too
// slow. The results are those of megatron_rl/batching/balance.py, index for index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

namespace {

using Index = int64_t;
using Lengths = std::vector<int64_t>;
using Shares = std::vector<std::vector<Index>>;

std::vector<Index> longest_first(const Lengths& lengths) {
  std::vector<Index> order(lengths.size());
  std::iota(order.begin(), order.end(), Index(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return lengths[a] > lengths[b]; });
  return order;
}

void sort_each(Shares& shares) {
  for (auto& share : shares) std::sort(share.begin(), share.end());
}

Shares balance(const Lengths& lengths, Index parts) {
  if (parts < 1) throw pybind11::value_error("parts must be >= 1");
  using Load = std::pair<int64_t, Index>;  // tokens, then the part's number
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (Index part = 0; part < parts; ++part) loads.push({0, part});
  Shares shares(parts);
  for (const Index index : longest_first(lengths)) {
    const auto [load, part] = loads.top();
    loads.pop();
    shares[part].push_back(index);
    loads.push({load + lengths[index], part});
  }
  sort_each(shares);
  return shares;
}

// The free tokens of packed rows. It finds the first row that has enough of them in logarithmic
// time: each node of a binary tree over the rows holds the most that any row below it has free.
class FreeRows {
 public:
  explicit FreeRows(size_t max_rows) {
    while (leaves_ < max_rows) leaves_ *= 2;
    most_.assign(2 * leaves_, kNoRow);
  }

  // The number of the first row with this many free tokens, or -1.
  Index first_with(int64_t tokens) const {
    if (most_[1] < tokens) return -1;
    size_t node = 1;
    while (node < leaves_) node = 2 * node + (most_[2 * node] < tokens);
    return static_cast<Index>(node - leaves_);
  }

  void set(Index row, int64_t tokens) {
    size_t node = leaves_ + static_cast<size_t>(row);
    most_[node] = tokens;
    for (node /= 2; node > 0; node /= 2) {
      most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
    }
  }

  int64_t at(Index row) const { return most_[leaves_ + static_cast<size_t>(row)]; }

 private:
  static constexpr int64_t kNoRow = INT64_MIN;
  size_t leaves_ = 1;
  std::vector<int64_t> most_;  // of node n: of its children 2n and 2n + 1; rows from leaves_ on
};

Shares fill_rows(const Lengths& lengths, int64_t budget) {
  Shares rows;
  FreeRows free(lengths.size());
  for (const Index index : longest_first(lengths)) {
    Index row = free.first_with(lengths[index]);
    if (row < 0) {
      row = static_cast<Index>(rows.size());
      rows.emplace_back();
      free.set(row, budget);
    }
    rows[row].push_back(index);
    free.set(row, free.at(row) - lengths[index]);
  }
  sort_each(rows);
  return rows;
}

}  // namespace

PYBIND11_MODULE(_scheduling, module) {
  module.def("balance", &balance, pybind11::arg("lengths"), pybind11::arg("parts"));
  module.def("fill_rows", &fill_rows, pybind11::arg("lengths"), pybind11::arg("budget"));
}
