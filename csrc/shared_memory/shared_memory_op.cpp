// Collectives of ranks of one machine, through memory that they share.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>

#include "../common/tensors.h"
#include "meeting.h"
#include "reduce.h"

namespace megatron_rl {
namespace {

// Groups are known by numbers, so that an op can name one.
class Groups {
 public:
  int64_t add(std::shared_ptr<Meeting> meeting) {
    const std::lock_guard<std::mutex> lock(mutex_);
    meetings_.push_back(std::move(meeting));
    return static_cast<int64_t>(meetings_.size()) - 1;
  }

  std::shared_ptr<Meeting> at(int64_t group) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (group < 0 || group >= static_cast<int64_t>(meetings_.size()) || !meetings_[group]) {
      throw std::runtime_error("ranks that meet in shared memory: this group was closed");
    }
    return meetings_[group];
  }

  void close(int64_t group) {
    const std::shared_ptr<Meeting> meeting = at(group);
    const std::lock_guard<std::mutex> lock(mutex_);
    meetings_[group].reset();
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Meeting>> meetings_;
};

Groups& groups() {
  static Groups* made = new Groups;  // never destroyed: a thread may meet while a process ends
  return *made;
}

int64_t kind_of(int64_t collective, const Tensor& tensor, int64_t detail) {
  return (collective << 48) | (static_cast<int64_t>(tensor.scalar_type()) << 32) | detail;
}

int64_t bytes_in(const Tensor& tensor) { return tensor.numel() * tensor.element_size(); }

char* bytes_of(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

// A rank's own part, which lies where it belongs already if it is a part of the result.
void copy_own(char* to, const char* from, int64_t count) {
  if (to != from) memcpy(to, from, count);
}

void check_dense(const Checks& checks, const Tensor& tensor, const char* argument) {
  checks.that(tensor.is_contiguous(), argument, "a contiguous tensor", StridesOf{tensor});
}

// Calls fn(value_t{}) with the type of the elements.
template <typename Fn>
void with_value_type(const Checks& checks, const Tensor& tensor, Fn fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return fn(int64_t{});
    case ScalarType::Int:
      return fn(int32_t{});
    default:
      return with_logit_type(checks, "x", tensor, fn);
  }
}

// What the ranks have written from an offset on; of this rank, what it still has itself.
template <typename value_t>
std::vector<const value_t*> values_of_ranks(Meeting& meeting, int64_t offset, const value_t* own) {
  std::vector<const value_t*> inputs;
  for (int rank = 0; rank < meeting.size(); ++rank) {
    const value_t* slot = reinterpret_cast<const value_t*>(meeting.slot(rank)) + offset;
    inputs.push_back(rank == meeting.rank() ? own : slot);
  }
  return inputs;
}

// Every rank adds up all of it: one round, and the work of the group's size.
template <typename value_t>
void reduce_at_once(Meeting& meeting, const Purpose& purpose, Reduction reduction, value_t* x,
                    int64_t count) {
  memcpy(meeting.own_slot(), x, count * sizeof(value_t));
  meeting.meet(purpose);
  reduce_values(reduction, x, values_of_ranks<value_t>(meeting, 0, x), count);
  meeting.next_round();
}

// Every rank adds up its share, and then takes the shares of the others.
template <typename value_t>
void reduce_by_shares(Meeting& meeting, const Purpose& purpose, Reduction reduction, value_t* x,
                      int64_t count) {
  const int64_t share = (count + meeting.size() - 1) / meeting.size();
  const auto begin_of = [&](int rank) { return std::min(rank * share, count); };
  const auto length_of = [&](int rank) { return begin_of(rank + 1) - begin_of(rank); };
  const int64_t own = begin_of(meeting.rank());
  memcpy(meeting.own_slot(), x, count * sizeof(value_t));
  meeting.meet(purpose);
  const auto inputs = values_of_ranks<value_t>(meeting, own, x + own);
  reduce_values(reduction, x + own, inputs, length_of(meeting.rank()));
  meeting.next_round();
  memcpy(meeting.own_slot(), x + own, length_of(meeting.rank()) * sizeof(value_t));
  meeting.meet(purpose);
  for (int rank = 0; rank < meeting.size(); ++rank) {
    if (rank == meeting.rank()) continue;
    memcpy(x + begin_of(rank), meeting.slot(rank), length_of(rank) * sizeof(value_t));
  }
  meeting.next_round();
}

void shared_all_reduce_(Tensor x, int64_t group, int64_t reduction) {
  constexpr int64_t kSmall = 8192;  // bytes that every rank may as well add up
  const Checks checks("shared_all_reduce_", x, "x");
  check_dense(checks, x, "x");
  const auto meeting = groups().at(group);
  if (meeting->size() == 1) return;
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  const Purpose purpose = {"all_reduce", kind_of(1, x, reduction), bytes_in(x)};
  with_value_type(checks, x, [&](auto zero) {
    using value_t = decltype(zero);
    value_t* values = output<value_t>(x);
    const int64_t most = meeting->slot_bytes() / static_cast<int64_t>(sizeof(value_t));
    const bool at_once = meeting->size() == 2 || bytes_in(x) <= kSmall;
    for (int64_t start = 0; start < x.numel(); start += most) {
      const int64_t count = std::min(most, x.numel() - start);
      const auto reduce = at_once ? reduce_at_once<value_t> : reduce_by_shares<value_t>;
      reduce(*meeting, purpose, static_cast<Reduction>(reduction), values + start, count);
    }
  });
}

// x holds a part for every rank, out becomes the reduction of this rank's part.
void shared_reduce_scatter(Tensor out, const Tensor& x, int64_t group, int64_t reduction) {
  const Checks checks("shared_reduce_scatter", x, "x");
  check_dense(checks, x, "x");
  check_dense(checks, out, "out");
  const auto meeting = groups().at(group);
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  const int size = meeting->size();
  checks.that(x.numel() == size * out.numel() && x.scalar_type() == out.scalar_type(), "out",
              "the type of x and its elements by the number of ranks",
              std::to_string(out.numel()) + " elements of " + name_of(out.scalar_type()));
  if (size == 1) return copy_own(bytes_of(out), bytes_of(x), bytes_in(x));
  const Purpose purpose = {"reduce_scatter", kind_of(2, x, reduction), bytes_in(x)};
  with_value_type(checks, x, [&](auto zero) {
    using value_t = decltype(zero);
    const int64_t most = meeting->slot_bytes() / static_cast<int64_t>(sizeof(value_t)) / size;
    for (int64_t start = 0; start < out.numel(); start += most) {
      const int64_t count = std::min(most, out.numel() - start);
      value_t* own = reinterpret_cast<value_t*>(meeting->own_slot());
      for (int rank = 0; rank < size; ++rank) {
        if (rank == meeting->rank()) continue;
        const value_t* part = input<value_t>(x) + rank * out.numel() + start;
        memcpy(own + rank * count, part, count * sizeof(value_t));
      }
      meeting->meet(purpose);
      const value_t* kept = input<value_t>(x) + meeting->rank() * out.numel() + start;
      const auto inputs = values_of_ranks<value_t>(*meeting, meeting->rank() * count, kept);
      reduce_values(static_cast<Reduction>(reduction), output<value_t>(out) + start, inputs, count);
      meeting->next_round();
    }
  });
}

// out holds a part of every rank, one behind the other.
void shared_all_gather(Tensor out, const Tensor& x, int64_t group) {
  const Checks checks("shared_all_gather", x, "x");
  check_dense(checks, x, "x");
  check_dense(checks, out, "out");
  const auto meeting = groups().at(group);
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  checks.that(bytes_in(out) == meeting->size() * bytes_in(x), "out",
              "the bytes of x for every rank", std::to_string(bytes_in(out)) + " bytes");
  copy_own(bytes_of(out) + meeting->rank() * bytes_in(x), bytes_of(x), bytes_in(x));
  if (meeting->size() == 1) return;
  const Purpose purpose = {"all_gather", kind_of(3, x, 0), bytes_in(x)};
  for (int64_t start = 0; start < bytes_in(x); start += meeting->slot_bytes()) {
    const int64_t count = std::min(meeting->slot_bytes(), bytes_in(x) - start);
    memcpy(meeting->own_slot(), bytes_of(x) + start, count);
    meeting->meet(purpose);
    for (int rank = 0; rank < meeting->size(); ++rank) {
      if (rank == meeting->rank()) continue;
      memcpy(bytes_of(out) + rank * bytes_in(x) + start, meeting->slot(rank), count);
    }
    meeting->next_round();
  }
}

// Bytes that every rank sends to every other one: element [source * size + destination].
std::vector<int64_t> traffic_of(Meeting& meeting, const Purpose& purpose, const int64_t* sent) {
  const int size = meeting.size();
  std::vector<int64_t> traffic(size * size);
  memcpy(meeting.own_slot(), sent, size * sizeof(int64_t));
  meeting.meet(purpose);
  for (int rank = 0; rank < size; ++rank) {
    memcpy(traffic.data() + rank * size, meeting.slot(rank), size * sizeof(int64_t));
  }
  meeting.next_round();
  return traffic;
}

// sent, received: bytes of the parts of x for every rank, and of the parts of out from every rank.
void shared_all_to_all(Tensor out, const Tensor& x, const Tensor& sent, const Tensor& received,
                       int64_t group) {
  const Checks checks("shared_all_to_all", x, "x");
  check_dense(checks, x, "x");
  check_dense(checks, out, "out");
  const auto meeting = groups().at(group);
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  const int64_t size = meeting->size(), own = meeting->rank();
  checks.dense(sent, "sent", ScalarType::Long, {size});
  checks.dense(received, "received", ScalarType::Long, {size});
  const Purpose purpose = {"all_to_all", kind_of(6, x, 0), 0};
  const auto traffic = traffic_of(*meeting, purpose, input<int64_t>(sent));
  std::vector<int64_t> to(size + 1), from(size + 1);  // where parts begin
  for (int64_t rank = 0; rank < size; ++rank) {
    const int64_t coming = traffic[rank * size + own];
    const int64_t expected = input<int64_t>(received)[rank];
    checks.that(coming == expected, "received",
                std::to_string(coming) + " bytes from rank " + std::to_string(rank),
                std::to_string(expected));
    to[rank + 1] = to[rank] + traffic[own * size + rank];
    from[rank + 1] = from[rank] + coming;
  }
  checks.that(to[size] == bytes_in(x) && from[size] == bytes_in(out), "sent",
              "the bytes of x, and in received those of out",
              std::to_string(to[size]) + " and " + std::to_string(from[size]));
  memcpy(bytes_of(out) + from[own], bytes_of(x) + to[own], to[own + 1] - to[own]);
  int64_t most = 0;  // that one rank has for another
  for (int64_t source = 0; source < size; ++source) {
    for (int64_t rank = 0; rank < size; ++rank) {
      if (rank != source) most = std::max(most, traffic[source * size + rank]);
    }
  }
  const int64_t room = meeting->slot_bytes() / size;  // for each destination
  for (int64_t start = 0; start < most; start += room) {
    const auto piece = [&](const std::vector<int64_t>& begins, int64_t rank) {
      return std::clamp<int64_t>(begins[rank + 1] - begins[rank] - start, 0, room);
    };
    for (int64_t rank = 0; rank < size; ++rank) {
      if (rank == own) continue;
      memcpy(meeting->own_slot() + rank * room, bytes_of(x) + to[rank] + start, piece(to, rank));
    }
    meeting->meet(purpose);
    for (int64_t rank = 0; rank < size; ++rank) {
      if (rank == own) continue;
      const char* slot = meeting->slot(static_cast<int>(rank)) + own * room;
      memcpy(bytes_of(out) + from[rank] + start, slot, piece(from, rank));
    }
    meeting->next_round();
  }
}

void shared_broadcast_(Tensor x, int64_t group, int64_t root) {
  const Checks checks("shared_broadcast_", x, "x");
  check_dense(checks, x, "x");
  const auto meeting = groups().at(group);
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  const Purpose purpose = {"broadcast", kind_of(4, x, root), bytes_in(x)};
  for (int64_t start = 0; start < bytes_in(x); start += meeting->slot_bytes()) {
    const int64_t count = std::min(meeting->slot_bytes(), bytes_in(x) - start);
    const bool is_root = meeting->rank() == root;
    if (is_root) memcpy(meeting->own_slot(), bytes_of(x) + start, count);
    meeting->meet(purpose);
    if (!is_root) memcpy(bytes_of(x) + start, meeting->slot(static_cast<int>(root)), count);
    meeting->next_round();
  }
}

void shared_barrier(const Tensor& anchor, int64_t group) {
  const auto meeting = groups().at(group);
  const std::lock_guard<std::mutex> lock(meeting->mutex());
  meeting->meet({"barrier", kind_of(5, anchor, 0), 0});
  meeting->next_round();
}

// Memory for a group of so many ranks: a file without a name, or -1 where there can be none.
int64_t shared_create(const Tensor& pids, int64_t slot_bytes) {
  const int fd = memfd_create("megatron_rl", MFD_CLOEXEC);
  if (fd >= 0 && ftruncate(fd, Meeting::bytes_of(pids.numel(), slot_bytes)) != 0) {
    ::close(fd);
    return -1;
  }
  return fd;
}

int64_t shared_open(const Tensor& pids, int64_t fd, int64_t rank, int64_t slot_bytes,
                    double timeout_s) {
  const Checks checks("shared_open", pids, "pids");
  checks.dense(pids, "pids", ScalarType::Long, {pids.numel()});
  const int64_t* first = input<int64_t>(pids);
  return groups().add(std::make_shared<Meeting>(static_cast<int>(fd), static_cast<int>(rank),
                                                std::vector<int64_t>(first, first + pids.numel()),
                                                slot_bytes, timeout_s));
}

void shared_close(const Tensor&, int64_t group) { groups().close(group); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("shared_create", TORCH_BOX(&shared_create));
  m.impl("shared_open", TORCH_BOX(&shared_open));
  m.impl("shared_close", TORCH_BOX(&shared_close));
  m.impl("shared_all_reduce_", TORCH_BOX(&shared_all_reduce_));
  m.impl("shared_reduce_scatter", TORCH_BOX(&shared_reduce_scatter));
  m.impl("shared_all_gather", TORCH_BOX(&shared_all_gather));
  m.impl("shared_all_to_all", TORCH_BOX(&shared_all_to_all));
  m.impl("shared_broadcast_", TORCH_BOX(&shared_broadcast_));
  m.impl("shared_barrier", TORCH_BOX(&shared_barrier));
}

}  // namespace megatron_rl
