// From what is known at run time to constants and types.

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<n>) if n is one of VALUES; whether it was.
template <int... VALUES, class F>
FK_INLINE bool with_constant(int64_t n, F f) {
  return ((n == VALUES ? (f(Constant<VALUES>{}), true) : false) || ...);
}
// f(Constant<n>) for n in 1..MOST.
template <int MOST, class F>
FK_INLINE void with_constant_up_to(int64_t n, F f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_constant_up_to<MOST - 1>(n, f);
  f(Constant<MOST>{});
}

// f(T{}) for the storage dtype's T.
template <class F>
static void with_dtype(DType dtype, F f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  return f(f16{});
}
