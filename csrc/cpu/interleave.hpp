// Matrices between memory and lanes: one lane, one matrix.
//
// Included once per instruction set after svd_view.hpp and transpose.hpp.

// rows x cols matrices in the lanes of packs: element (i, c) at data[i + c * step].
template <class T, int W>
class Interleaved {
  public:
    Interleaved(Pack<T, W> *data, int rows, int cols, int step) : data_(data), rows_(rows), cols_(cols), step_(step) {}

    // `count` matrices `stride` elements apart; the other lanes become zero.
    void load(const View<const T> &from, int64_t stride, int count) const {
        const bool tiled = each_tile(from.row, from.col, [&](int first, const int *pack) {
            for (int w = 0; w < W; ++w) {
                V tile[kWidth<T>];
                for (int l = 0; l < kWidth<T>; ++l) {
                    const int matrix = w * kWidth<T> + l;
                    if (matrix < count)
                        __builtin_memcpy(&tile[l], from.data + matrix * stride + first, sizeof(V));
                    else
                        tile[l] = V{};
                }
                transpose<T>(tile);
                for (int k = 0; k < kWidth<T>; ++k) data_[pack[k]].v[w] = tile[k];
            }
        });
        if (tiled) return;
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < rows_; ++i) {
                const T *element = &from(i, c);
                T *to = (T *)&data_[i + c * step_];
                for (int l = 0; l < Pack<T, W>::lanes; ++l) to[l] = l < count ? element[l * stride] : T(0);
            }
    }

    void store(const View<T> &to, int64_t stride, int count) const {
        const bool tiled = each_tile(to.row, to.col, [&](int first, const int *pack) {
            for (int w = 0; w < W; ++w) {
                V tile[kWidth<T>];
                for (int k = 0; k < kWidth<T>; ++k) tile[k] = data_[pack[k]].v[w];
                transpose<T>(tile);
                for (int l = 0; l < kWidth<T> && w * kWidth<T> + l < count; ++l)
                    __builtin_memcpy(to.data + (w * kWidth<T> + l) * stride + first, &tile[l], sizeof(V));
            }
        });
        if (tiled) return;
        for (int l = 0; l < count; ++l)
            for (int c = 0; c < cols_; ++c)
                for (int i = 0; i < rows_; ++i) to.data[l * stride + i * to.row + c * to.col] = ((const T *)&data_[i + c * step_])[l];
    }

  private:
    using V = typename Lane<T>::V;

    // The tiles of a matrix that lies in memory without gaps, kWidth elements each, the last one over its neighbour where it must:
    // where each starts, and the packs of its elements. False, and nothing done, where there are gaps or too few elements.
    template <class Move>
    bool each_tile(int64_t row, int64_t col, Move move) const {
        const bool by_rows = col == 1 && row == cols_, by_cols = row == 1 && col == rows_;
        const int size = rows_ * cols_;
        if (!(by_rows || by_cols) || size < kWidth<T>) return false;
        const int inner = by_rows ? cols_ : rows_, inner_step = by_rows ? step_ : 1, outer_step = by_rows ? 1 : step_;
        for (int e = 0; e < size; e += kWidth<T>) {
            const int first = e + kWidth<T> <= size ? e : size - kWidth<T>;
            int pack[kWidth<T>], i = first % inner, start = first / inner * outer_step;
            for (int k = 0; k < kWidth<T>; ++k) {
                pack[k] = start + i * inner_step;
                if (++i == inner) i = 0, start += outer_step;
            }
            move(first, pack);
        }
        return true;
    }

    Pack<T, W> *const data_;
    const int rows_, cols_, step_;
};
