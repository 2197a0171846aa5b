// Rows of tokens: where they lie, their form as an operand of a product, and sums over them.

// Walks rows of tokens without dividing at every step.
template <class T>
struct RowCursor {
  const Rows& rows;
  int64_t image, t, m, w;

  RowCursor(const Rows& r, int64_t row) : rows(r) {
    image = row / r.pixels;
    int64_t pixel = row % r.pixels;
    w = pixel % r.W;
    m = pixel / r.W % r.M;
    t = pixel / r.W / r.M;
  }
  T* next() {
    T* p = static_cast<T*>(rows.data) + image * rows.image + t * rows.t + m * rows.m + w * rows.w;
    if (++w == rows.W) {
      w = 0;
      if (++m == rows.M) {
        m = 0;
        if (++t * rows.M * rows.W == rows.pixels) t = 0, ++image;
      }
    }
    return p;
  }
};

// How many rows from a multiple of the result on lie at one distance from each other.
FK_INLINE int64_t regular_run(const Rows& r) {
  const int64_t slab = r.M * r.W, T = slab ? r.pixels / slab : 0;
  if (r.M > 1 && r.m != r.W * r.w) return r.W;
  if (T > 1 && r.t != slab * r.w) return slab;
  return r.image != r.pixels * r.w ? r.pixels : int64_t(1) << 60;
}

// n rows by their addresses: element (i, c) at rows[i][c * channel].
template <class T>
struct RowBlock {
  T** rows;
  int64_t n, channel;

  FK_INLINE T* operator[](int64_t i) const { return rows[i]; }
  FK_INLINE vf load(int64_t i, int64_t c, int lanes) const { return load_lanes(rows[i] + c * channel, lanes, channel); }
  FK_INLINE void store(int64_t i, int64_t c, int lanes, vf x) const {
    store_lanes(rows[i] + c * channel, lanes, channel, x);
  }
};

// Rows row0..row0 + n of `all`. No addresses if there is no such matrix, or the arena only counts.
template <class T>
static RowBlock<T> row_block(Arena& arena, const Rows& all, int64_t row0, int64_t n) {
  const RowBlock<T> block{arena.take<T*>(n), n, all.channel};
  if (arena.memory && all.data) {
    RowCursor<T> cursor(all, row0);
    for (int64_t i = 0; i < n; ++i) block.rows[i] = cursor.next();
  }
  return block;
}
// n rows of C values, in the arena.
template <class T>
static RowBlock<T> new_row_block(Arena& arena, int64_t n, int64_t C) {
  const RowBlock<T> block{arena.take<T*>(n), n, 1};
  T* values = arena.take<T>(n * C);
  if (arena.memory)
    for (int64_t i = 0; i < n; ++i) block.rows[i] = values + i * C;
  return block;
}
// Rows of a residual branch's x, y, or their gradients: stored as T, or as float around a body of 16 bits.
template <class T>
struct StreamRows {
  RowBlock<T> of_body;  // its addresses are those of floats where `wide`
  bool wide;

  FK_INLINE RowBlock<float> as_float() const {
    return {reinterpret_cast<float**>(of_body.rows), of_body.n, of_body.channel};
  }
  FK_INLINE vf load(int64_t i, int64_t c, int lanes) const {
    return wide ? as_float().load(i, c, lanes) : of_body.load(i, c, lanes);
  }
  FK_INLINE void store(int64_t i, int64_t c, int lanes, vf x) const {
    return wide ? as_float().store(i, c, lanes, x) : of_body.store(i, c, lanes, x);
  }
};
template <class T>
static StreamRows<T> stream_rows(Arena& arena, const Residual& r, const Rows& all, int64_t row0, int64_t n) {
  if (sizeof(T) == 4 || !r.wide) return {row_block<T>(arena, all, row0, n), false};
  const RowBlock<float> block = row_block<float>(arena, all, row0, n);
  return {{reinterpret_cast<T**>(block.rows), n, block.channel}, true};
}
// f(rows) as what they are.
template <class T, class F>
FK_INLINE auto with_rows(const StreamRows<T>& x, F f) {
  if constexpr (sizeof(T) < 4)
    if (x.wide) return f(x.as_float());
  return f(x.of_body);
}

// Room for the operand form of n rows.
template <class T>
FK_INLINE operand_t<T>* operand_memory(Arena& arena, int64_t n, int64_t K) {
  return arena.take<operand_t<T>>(n * padded_k<operand_t<T>>(K));
}

// The operand form of rows of K channels: themselves where that is possible, otherwise a copy in `memory`.
template <class T, class CT>
static OperandRows<CT> operand_rows(const RowBlock<T>& rows, int64_t K, CT* memory) {
  const int64_t n = rows.n, Kp = padded_k<CT>(K);
  if constexpr (sizeof(CT) == sizeof(T)) {
    bool regular = rows.channel == 1 && Kp == K;
    for (int64_t i = 2; regular && i < n; ++i) regular = rows[i] - rows[i - 1] == rows[1] - rows[0];
    if (regular) return {reinterpret_cast<const CT*>(rows[0]), n > 1 ? rows[1] - rows[0] : 0, n};
  }
  if (rows.channel == 1) {
    for (int64_t i = 0; i < n; ++i) {
      CT* to = memory + i * Kp;
      int64_t k = 0;
      for (; k + VL <= K; k += VL) store(to + k, load(rows[i] + k));
      for (; k < K; ++k) convert(to + k, rows[i][k]);
    }
  } else {  // channel planes: read along the pixels
    for (int64_t i = 0; i < n; i += VL) {
      bool square = n - i >= VL;
      for (int j = 1; square && j < VL; ++j) square = rows[i + j] - rows[i] == j;
      int64_t k = 0;
      for (; square && k + VL <= K; k += VL) {
        vf x[VL];
        for (int j = 0; j < VL; ++j) x[j] = load(rows[i] + (k + j) * rows.channel);
        transpose(x);
        for (int j = 0; j < VL; ++j) store(memory + (i + j) * Kp + k, x[j]);
      }
      for (; k < K; ++k)
        for (int64_t j = i; j < n && j < i + VL; ++j) convert(memory + j * Kp + k, rows[j][k * rows.channel]);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = K; k < Kp; ++k) memory[i * Kp + k] = CT{};
  return {memory, Kp, n};
}

// Sums over rows in two stages, SUMMED rows at a time: a long run of additions into one float would lose digits.
struct RowSums {
  static constexpr int64_t SUMMED = 16;
  float *some, *all;
  int64_t n;
  RowSums(float* memory, float* to, int64_t count) : some(memory), all(to), n(count) {
    __builtin_memset(some, 0, n * sizeof(float));
    __builtin_memset(all, 0, n * sizeof(float));
  }
  FK_INLINE void add(int64_t at, int lanes, vf value) const {
    store_lanes(some + at, lanes, 1, load_lanes(some + at, lanes, 1) + value);
  }
  FK_INLINE void end_of_row(int64_t row, int64_t rows) const {
    if (row % SUMMED != SUMMED - 1 && row != rows - 1) return;
    for (int64_t i = 0; i < n; ++i) all[i] += some[i], some[i] = 0;
  }
};
