// Scratch memory of a task.
//
// What a kernel needs is said in one place: a struct whose constructor takes its pieces from an arena. An arena without
// memory only counts, so the same constructor measures the memory, for the largest task, and places the pieces in it.

struct Arena {
  char* memory;  // null: only counts, and every piece is null
  int64_t bytes = 0;

  explicit Arena(void* all) : memory(static_cast<char*>(all)) {}
  // n values, on cache lines of their own
  template <class T>
  FK_INLINE T* take(int64_t n) {
    T* piece = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};
