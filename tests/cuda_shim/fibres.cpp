#include "fibres.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>

namespace focalnet_shim {

namespace {

constexpr size_t STACK = 64 * 1024;
enum class State { ready, at_warp, at_block, done };

struct Fibre {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::done;
  Place place;  // of the barrier it waits at
  Index thread;
  unsigned turns = 0;
  std::vector<char> stack = std::vector<char>(STACK);
};

// One block runs at a time, whichever thread of the process launches it.
struct Machine {
  std::vector<Fibre> fibres;
  std::vector<unsigned char> mail, shared;
  std::mt19937_64 random{0};
  Running running;
  size_t current = 0;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string failure;
};
Machine machine;
Runner set_runner = nullptr;

void enter() {
  try {
    (*machine.kernel)();
  } catch (const std::exception& error) {
    machine.failure = error.what();
  }
  machine.fibres[machine.current].state = State::done;
  _longjmp(machine.scheduler, 1);
}

void resume(size_t i) {
  Fibre& fibre = machine.fibres[i];
  machine.current = i;
  machine.running.thread = fibre.thread;
  if (_setjmp(machine.scheduler) != 0) return;  // back from the fibre
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

void wait(State state, Place place) {
  Fibre& fibre = machine.fibres[machine.current];
  fibre.state = state;
  fibre.place = place;
  if (_setjmp(fibre.resume) == 0) _longjmp(machine.scheduler, 1);
}

// Releases a barrier that all threads have reached; those that are done count as having reached it.
bool release(size_t first, size_t last, State barrier) {
  const Fibre* before = nullptr;
  for (size_t i = first; i < last; ++i) {
    const Fibre& fibre = machine.fibres[i];
    if (fibre.state == State::done) continue;
    if (fibre.state != barrier) return false;
    if (before && (before->place.line() != fibre.place.line() || before->place.column() != fibre.place.column()))
      throw std::runtime_error("threads wait at different barriers");
    before = &fibre;
  }
  for (size_t i = first; i < last; ++i)
    if (machine.fibres[i].state == barrier) machine.fibres[i].state = State::ready;
  return before != nullptr;
}

// Lets every thread of a warp that can run go to its next barrier. Returns whether there was one.
bool run_warp(size_t first, size_t last) {
  size_t order[32];
  for (size_t i = first; i < last; ++i) order[i - first] = i;
  std::shuffle(order, order + (last - first), machine.random);
  bool ran = false;
  for (size_t j = 0; j < last - first; ++j)
    if (machine.fibres[order[j]].state == State::ready) {
      resume(order[j]);
      ran = true;
      if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
    }
  release(first, last, State::at_warp);
  return ran;
}

void run_block(int threads) {
  std::vector<Fibre>& fibres = machine.fibres;
  if (fibres.size() < size_t(threads)) fibres.resize(threads);
  machine.mail.assign(size_t(threads + 31) / 32 * 2 * 32 * 64, 0);
  for (int i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.data();
    fibre.start.uc_stack.ss_size = fibre.stack.size();
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, enter, 0);
    fibre.started = false;
    fibre.turns = 0;
    fibre.state = State::ready;
    fibre.thread.x = i;
  }
  const auto last_of = [&](size_t warp) { return std::min<size_t>(threads, warp + 32); };
  std::vector<size_t> warps((threads + 31) / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = 32 * i;
  while (true) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    bool ran = false;
    for (size_t warp : warps)  // how far one gets ahead of the others is random too: a step, or all it can
      for (unsigned turns = 1u << machine.random() % 12; turns > 0 && run_warp(warp, last_of(warp)); --turns)
        ran = true;
    const bool released = release(0, threads, State::at_block);
    if (ran || released) continue;
    for (int i = 0; i < threads; ++i)
      if (fibres[i].state != State::done) throw std::runtime_error("threads wait at barriers that others never reach");
    return;
  }
}

}  // namespace

const Running& running() { return machine.running; }
void wait_for_block(Place place) { wait(State::at_block, place); }
void wait_for_warp(Place place) { wait(State::at_warp, place); }
void turn() { ++machine.fibres[machine.current].turns; }
unsigned char* mailbox(int lane) {
  const size_t set = machine.fibres[machine.current].turns % 2;
  return machine.mail.data() + ((machine.running.thread.x / 32 * 2 + set) * 32 + lane) * 64;
}
void* shared_memory() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 15) / 16 * 16);
}

void run_blocks(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  machine.failure.clear();
  machine.running.grid.x = unsigned(blocks);
  machine.running.size.x = unsigned(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    machine.shared.assign(shared_bytes + 32, 0xff);  // NaN in every floating-point format
    machine.running.block.x = unsigned(block);
    run_block(threads);
  }
}

Runner runner() { return set_runner; }
void seed(uint64_t seed) { machine.random.seed(seed); }

}  // namespace focalnet_shim

// For ctypes: every library has a machine of its own.
extern "C" __attribute__((visibility("default"))) void focalnet_shim_seed(uint64_t seed) { focalnet_shim::seed(seed); }
extern "C" __attribute__((visibility("default"))) void focalnet_shim_set_runner(focalnet_shim::Runner runner) {
  focalnet_shim::set_runner = runner;
}
