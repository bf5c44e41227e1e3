// Ranks of one machine that meet in memory which all of them have mapped. No torch.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace megatron_rl {

// What a rank has come for. Ranks that meet for different things are told so.
struct Purpose {
  const char* name;
  int64_t kind;  // tells collectives, types and operations apart
  int64_t bytes;
};

// A group of ranks. In each round every rank writes to its own slot, says so, waits for all others,
// and reads what it needs from any slot. Slots take turns: a rank that writes to a slot again has
// seen every other rank come to the round behind the one in which the slot was read.
class Meeting {
 public:
  // Bytes of the memory that such a group maps.
  static int64_t bytes_of(int64_t num_ranks, int64_t slot_bytes);

  // fd: of such memory, filled with zeros; it may be closed afterwards. pids: of all ranks.
  Meeting(int fd, int rank, const std::vector<int64_t>& pids, int64_t slot_bytes, double timeout_s);
  ~Meeting();
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(pids_.size()); }
  int64_t slot_bytes() const { return slot_bytes_; }

  // Of the round that comes next, before meet(); of the last one, behind it.
  char* own_slot() { return slot(rank_); }
  char* slot(int rank);

  // Ends the round's writing. Throws std::runtime_error: another rank has ended or left, does not
  // come within the time-out, or has come for something else. Nobody can meet here from then on.
  void meet(const Purpose& purpose);
  void next_round() { ++round_; }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Place;
  void await(int peer);
  void sleep_until_posted(int peer);
  void check_purpose(int peer, const Purpose& purpose);
  [[noreturn]] void fail(int peer, const std::string& what);

  Place* places_ = nullptr;
  char* slots_ = nullptr;
  int64_t mapped_bytes_;
  const int64_t slot_bytes_;
  const int rank_;
  const std::vector<int64_t> pids_;
  std::vector<int> watches_;  // of each rank: becomes readable when its process has ended; or -1
  const std::chrono::duration<double> timeout_;
  uint32_t round_ = 1;
  bool is_broken_ = false;
  int spins_;
  std::mutex mutex_;
};

}  // namespace megatron_rl
