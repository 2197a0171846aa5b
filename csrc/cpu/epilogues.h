// What is done with the sums of a product. An epilogue has three functions, called for one tile after the other.
//
// Before the product, prefetch(row, rows, column) asks for the memory that the others will touch.
//
// full_tile(row, rows, column, sums) takes `sums` (rows, NR), every column of which is in the matrix; where it
// returns false, nothing was done and edge is called.
//
// edge(row, column, n, sum) takes one vector of a row, its first n columns in the matrix.
//
// Rows begin at `row` and columns at `column` of the whole product. Most tiles are full, so what is worth making fast
// is full_tile. Another way to use the sums is another struct here.

// Asks for the part of rows row..row + rows that a tile will read or (WRITE) write: rows lie too far apart for the
// hardware to guess.
template <int WRITE, class T>
FK_INLINE void prefetch_tile(const RowBlock<T>& block, int64_t row, int64_t rows, int64_t column) {
  if (block.channel != 1) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < NR + 64 / int64_t(sizeof(T)) - 1; j += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(block[row + i] + column + (j < NR ? j : NR - 1), WRITE);
}

template <int WRITE, class T>
FK_INLINE void prefetch_tile(const StreamRows<T>& block, int64_t row, int64_t rows, int64_t column) {
  with_rows(block, [&](const auto& known) FK_LAMBDA { prefetch_tile<WRITE>(known, row, rows, column); });
}

// out = sum + bias
template <class T>
struct StoreBias {
  RowBlock<T> out;
  const float* bias;  // or null

  FK_INLINE vf bias_at(int64_t column, int n) const { return bias ? load_lanes(bias + column, n, 1) : vf{}; }
  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const { prefetch_tile<1>(out, row, rows, column); }
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    if (out.channel != 1) return false;
    vf b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = bias_at(column + j * VL, VL);
    for (int64_t i = 0; i < rows; ++i, sums += NR) {
      T* to = out[row + i] + column;
      store_two(to, load(sums) + b[0], load(sums + VL) + b[1]);
      store(to + 2 * VL, load(sums + 2 * VL) + b[2]);
    }
    return true;
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const {
    out.store(row, column, n, sum + bias_at(column, n));
  }
};

// f(row, column, n, sum) for every vector of a full tile.
template <class F>
FK_INLINE void each_vector(int64_t row, int64_t rows, int64_t column, const float* sums, const F& f) {
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j, sums += VL) f(row + i, column + j * VL, VL, load(sums));
}

// f(row, column, n, sum), which reads the rows `in` and writes the rows `out`.
template <class In, class Out, class F>
struct ReadAndWriteRows {
  In in;
  Out out;
  F f;

  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const {
    prefetch_tile<0>(in, row, rows, column);
    prefetch_tile<1>(out, row, rows, column);
  }
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    each_vector(row, rows, column, sums, f);
    return true;
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const { f(row, column, n, sum); }
};
template <class In, class Out, class F>
ReadAndWriteRows(In, Out, F) -> ReadAndWriteRows<In, Out, F>;

// f(row, column, n, sum), which reads the rows `in`.
template <class Block, class F>
struct ReadRows {
  Block in;
  F f;

  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const { prefetch_tile<0>(in, row, rows, column); }
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    each_vector(row, rows, column, sums, f);
    return true;
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const { f(row, column, n, sum); }
};
template <class Block, class F>
ReadRows(Block, F) -> ReadRows<Block, F>;

// f(row, column, n, sum), for which nothing has to be fetched: what it touches is in cache.
template <class F>
struct NoRows {
  F f;

  FK_INLINE void prefetch(int64_t, int64_t, int64_t) const {}
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    each_vector(row, rows, column, sums, f);
    return true;
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const { f(row, column, n, sum); }
};
template <class F>
NoRows(F) -> NoRows<F>;
