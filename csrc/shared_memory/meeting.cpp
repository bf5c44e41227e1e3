#include "meeting.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <map>
#include <stdexcept>
#include <thread>

namespace megatron_rl {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 1000;  // some 30 us
constexpr auto kYielding = std::chrono::microseconds(100);
constexpr long kNanosecondsAsleep = 20'000'000;  // then it looks whether the other lives

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Becomes readable when the process has ended, also before its parent has asked; -1: unknown.
int watch_of(int64_t pid) {
  static std::mutex mutex;
  static std::map<int64_t, int> watches;  // they stay: one for each rank of this machine
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = watches.find(pid);
  if (known != watches.end()) return known->second;
#if defined(SYS_pidfd_open)
  const int watch = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
#else
  const int watch = -1;
#endif
  watches[pid] = watch;
  return watch;
}

bool has_ended(int64_t pid, int watch) {
  if (watch < 0) return kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH;
  pollfd look = {watch, POLLIN, 0};
  return poll(&look, 1, 0) > 0;
}

uint32_t* word_of(std::atomic<uint32_t>& value) { return reinterpret_cast<uint32_t*>(&value); }

void futex_wait(std::atomic<uint32_t>& value, uint32_t seen) {
  const timespec timeout = {0, kNanosecondsAsleep};
  syscall(SYS_futex, word_of(value), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& value) {
  syscall(SYS_futex, word_of(value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

// Of one rank, in the shared memory.
struct alignas(128) Meeting::Place {
  std::atomic<uint32_t> posted;  // the last round that it has come to
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> has_left;
  struct {
    int64_t kind;
    int64_t bytes;
    char name[24];
  } purposes[2];  // by round
};

static_assert(std::atomic<uint32_t>::is_always_lock_free);

int64_t Meeting::bytes_of(int64_t num_ranks, int64_t slot_bytes) {
  return num_ranks * (static_cast<int64_t>(sizeof(Place)) + 2 * slot_bytes);
}

Meeting::Meeting(int fd, int rank, const std::vector<int64_t>& pids, int64_t slot_bytes,
                 double timeout_s)
    : mapped_bytes_(bytes_of(static_cast<int64_t>(pids.size()), slot_bytes)),
      slot_bytes_(slot_bytes),
      rank_(rank),
      pids_(pids),
      timeout_(timeout_s) {
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    throw std::runtime_error(std::string("shared memory cannot be mapped: ") + strerror(errno));
  }
  places_ = static_cast<Place*>(memory);
  slots_ = static_cast<char*>(memory) + pids_.size() * sizeof(Place);
  for (const int64_t pid : pids_) watches_.push_back(watch_of(pid));
  // Who waits in a loop keeps the others from coming where there are fewer processors than ranks.
  const bool is_crowded = pids_.size() > std::thread::hardware_concurrency();
  spins_ = is_crowded ? 0 : kSpins;
}

Meeting::~Meeting() {
  Place& own = places_[rank_];
  own.has_left.store(1);
  futex_wake_all(own.posted);
  munmap(places_, mapped_bytes_);
}

char* Meeting::slot(int rank) { return slots_ + (2 * rank + (round_ & 1)) * slot_bytes_; }

void Meeting::meet(const Purpose& purpose) {
  if (is_broken_) fail(rank_, "met in vain before");
  Place& own = places_[rank_];
  auto& said = own.purposes[round_ & 1];
  said.kind = purpose.kind;
  said.bytes = purpose.bytes;
  strncpy(said.name, purpose.name, sizeof(said.name) - 1);
  own.posted.store(round_);
  if (own.sleepers.load() != 0) futex_wake_all(own.posted);
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    await(peer);
    check_purpose(peer, purpose);
  }
}

void Meeting::await(int peer) {
  const auto& posted = places_[peer].posted;
  const auto has_come = [&] {  // rounds are counted modulo 2^32
    return static_cast<int32_t>(posted.load(std::memory_order_acquire) - round_) >= 0;
  };
  for (int i = 0; i < spins_; ++i) {
    if (has_come()) return;
    pause_cpu();
  }
  const auto start = Clock::now();
  while (Clock::now() - start < kYielding) {
    if (has_come()) return;
    sched_yield();
  }
  sleep_until_posted(peer);
}

void Meeting::sleep_until_posted(int peer) {
  Place& place = places_[peer];
  struct Sleeper {
    std::atomic<uint32_t>& count;
    explicit Sleeper(std::atomic<uint32_t>& sleepers) : count(sleepers) { ++count; }
    ~Sleeper() { --count; }
  } sleeper(place.sleepers);
  const auto start = Clock::now();
  while (true) {
    const bool is_gone = place.has_left.load() != 0 || has_ended(pids_[peer], watches_[peer]);
    const uint32_t seen = place.posted.load();  // what it has said before it went counts
    if (static_cast<int32_t>(seen - round_) >= 0) return;
    if (is_gone) fail(peer, "has ended or left the group while others waited for it");
    if (Clock::now() - start > timeout_) {
      fail(peer, "did not come within " + std::to_string(timeout_.count()) + " s");
    }
    futex_wait(place.posted, seen);
  }
}

void Meeting::check_purpose(int peer, const Purpose& purpose) {
  const auto& said = places_[peer].purposes[round_ & 1];
  if (said.kind == purpose.kind && said.bytes == purpose.bytes) return;
  fail(peer, "is in " + std::string(said.name) + " of " + std::to_string(said.bytes) +
                 " bytes, where this rank is in " + purpose.name + " of " +
                 std::to_string(purpose.bytes) + " bytes or of another type");
}

void Meeting::fail(int peer, const std::string& what) {
  is_broken_ = true;
  places_[rank_].has_left.store(1);  // so that nobody waits for this one
  throw std::runtime_error("ranks that meet in shared memory: rank " + std::to_string(peer) +
                           " of " + std::to_string(size()) + " (process " +
                           std::to_string(pids_[peer]) + ") " + what);
}

}  // namespace megatron_rl
