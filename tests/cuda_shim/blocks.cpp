// Which blocks of memory tensors have on the CPU, for who runs kernels that are compiled: their accesses are checked
// against these.
#undef TORCH_TARGET_VERSION  // allocators are not part of the stable interface
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace {

constexpr size_t GAP = 4096;  // behind every block, for who runs over its end

std::mutex mutex;
std::map<uintptr_t, size_t> blocks;

class Recorder final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = c10::GetDefaultCPUAllocator()->raw_allocate(bytes + GAP);
    const std::lock_guard lock(mutex);
    blocks[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, data, free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void free(void* data) {
    {
      const std::lock_guard lock(mutex);
      blocks.erase(reinterpret_cast<uintptr_t>(data));
    }
    c10::GetDefaultCPUAllocator()->raw_deallocate(data);
  }
};
Recorder recorder;

}  // namespace

// From now on, or not any more.
extern "C" __attribute__((visibility("default"))) void focalnet_shim_record_blocks(bool record) {
  c10::SetCPUAllocator(record ? static_cast<c10::Allocator*>(&recorder) : c10::GetDefaultCPUAllocator());
}

// The block that has `address`: where it begins, and its bytes; false if none has.
extern "C" __attribute__((visibility("default"))) bool focalnet_shim_find_block(uint64_t address, uint64_t* first,
                                                                                uint64_t* bytes) {
  const std::lock_guard lock(mutex);
  auto block = blocks.upper_bound(address);
  if (block == blocks.begin()) return false;
  --block;
  if (address >= block->first + block->second) return false;
  *first = block->first;
  *bytes = block->second;
  return true;
}
