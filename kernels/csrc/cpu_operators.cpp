// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// The masquant:: operators on the CPU: checks operands, splits the work between threads
// and calls the kernels of cpu_kernels.h. Formulas: reference.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace masquant {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

//: whether products of more than a few tokens are by AMX
std::atomic<bool> use_tiles{has_tiles()};
#ifdef __AVX512VNNI__
//: whether others of bfloat16 tokens that are not quantized are of bfloat16 (AVX512-BF16),
//: which takes Intel's processors twice as long as float32
std::atomic<bool> use_bfloat16{__builtin_cpu_supports("avx512bf16") != 0 &&
                               !__builtin_cpu_is("intel")};
#else
std::atomic<bool> use_bfloat16{false};
#endif

void check_processor() {
  // One that a package has brought the library to.
  static const bool fits = has_processor();
  TORCH_CHECK(fits, "masquant: these kernels need a processor with ", kProcessor, ".");
}

// Panels that are worth a thread of their own.
int64_t panels_of_thread(int64_t tokens, int64_t in_features) {
  return 1 + 65536 / (tokens * in_features * kColumns + 1);
}

// Calls f(begin, end) until all of [0, items) is done. Each thread has a range of its own,
// which it finds in its caches at the next call, and takes it piece by piece; one that is
// through takes from the others, which may be waiting for a processor.
template <class F>
void share(int64_t items, int64_t grain, const F& f) {
  const int64_t workers =
      std::min<int64_t>(at::get_num_threads(), (items + grain - 1) / grain);
  if (workers <= 1 || at::in_parallel_region()) {
    if (items > 0) f(0, items);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(workers);
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next = items * w / workers;
    ranges[w].end = items * (w + 1) / workers;
  }
  const int64_t piece = std::max<int64_t>(1, items / (8 * workers));
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      for (int64_t i = 0; i < workers; ++i) {
        Range& range = ranges[(w + i) % workers];
        for (int64_t at; (at = range.next.fetch_add(piece)) < range.end;) {
          f(at, std::min(at + piece, range.end));
        }
      }
    }
  });
}

// Memory that a thread keeps between calls: a fresh block would cost a page fault for
// each 4 KiB, which is more than it takes to fill it.
template <class T>
T* scratch(int slot, int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t size = 0;
  };
  thread_local Block blocks[8];
  Block& block = blocks[slot];
  const size_t size = static_cast<size_t>(round_up(count * sizeof(T) + 64, 4096));
  if (block.size < size) {
    block.data.reset();
    block.data.reset(std::aligned_alloc(4096, size));
    TORCH_CHECK(block.data != nullptr, "masquant: out of memory for ", size, " bytes.");
    block.size = size;
  }
  return static_cast<T*>(block.data.get());
}

// Slots of scratch. Those of the calling thread are read by all.
enum Slot { kTokens, kPanel, kFloats, kProducts, kArrays, kRow, kShared };

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    case at::kChar:
      return Type::kInt8;
    default:
      TORCH_CHECK(false, "masquant: unexpected type ", t.scalar_type(), ".");
  }
}

bool is_known(const Tensor& t, bool integers) {
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf ||
         (integers && type == at::kChar);
}

Tensor floats(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

Tensor readable(const Tensor& t, bool integers) {
  return (is_known(t, integers) ? t : t.to(at::kFloat)).contiguous();
}

// Rows one behind the other in steps of any length.
Tensor readable_rows(const Tensor& t) {
  const Tensor known = is_known(t, false) ? t : t.to(at::kFloat);
  return known.size(1) > 1 && known.stride(1) != 1 ? known.contiguous() : known;
}

// (T,) int32 ids, each of [0, modalities).
Tensor checked_ids(const Tensor& ids, int64_t tokens, int64_t modalities) {
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) == tokens, "masquant: ", tokens,
              " tokens have modality ids of shape ", ids.sizes(), ".");
  Tensor narrow = ids.to(at::kInt).contiguous();
  const int32_t* data = narrow.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK_INDEX(data[t] >= 0 && data[t] < modalities, "masquant: modality id ",
                      data[t], " is out of range for ", modalities, " modalities.");
  }
  return narrow;
}

const char* row_of(const Tensor& t, int64_t row) {
  return static_cast<const char*>(t.const_data_ptr()) +
         row * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// ---- matrices, and which rows meet which ----

// Rows [begin, end) meet a matrix of their own.
struct Expert {
  int64_t number, begin, end;
  int64_t rows() const { return end - begin; }
};

// Those that have rows, one behind the other from row 0 on. A linear is one expert.
using Experts = std::vector<Expert>;

Experts one_expert(int64_t rows) {
  return rows > 0 ? Experts{{0, 0, rows}} : Experts();
}

// How many experts tensors are of. Those of a linear lack the dimension.
struct Stack {
  int64_t count;
  size_t leading;

  // The shape of what each expert has.
  at::IntArrayRef own_shape(const Tensor& t) const {
    return t.sizes().slice(std::min(leading, t.sizes().size()));
  }

  bool fits(const Tensor& t, at::IntArrayRef own) const {
    return t.dim() == static_cast<int64_t>(own.size() + leading) &&
           (leading == 0 || t.size(0) == count) && own_shape(t) == own;
  }
};

constexpr Stack kLinear{1, 0};

Experts experts_of(const Tensor& ends, int64_t count, int64_t rows) {
  TORCH_CHECK(ends.dim() == 1 && ends.size(0) == count && !ends.is_floating_point(),
              "masquant: ends must say of each of ", count,
              " experts where its rows end, got ", ends.sizes(), " ", ends.scalar_type(), ".");
  const Tensor places = ends.to(at::kLong).contiguous();
  Experts experts;
  int64_t begin = 0;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t end = places.const_data_ptr<int64_t>()[e];
    TORCH_CHECK_INDEX(begin <= end && end <= rows, "masquant: expert ", e, " has the rows from ",
                      begin, " to ", end, ", and there are ", rows, ".");
    if (begin < end) experts.push_back({e, begin, end});
    begin = end;
  }
  return experts;
}

// The weights of experts, which are not copied where each expert's are contiguous.
class Matrices {
 public:
  Matrices(const Stack& stack, const Tensor& qdata, int64_t in_features, int64_t weight_bits)
      : stack(stack) {
    const bool packed = weight_bits <= 4;
    const int64_t row_bytes = packed ? (in_features + 1) / 2 : in_features;
    const at::IntArrayRef shape = stack.own_shape(qdata);
    TORCH_CHECK(shape.size() == 2 && stack.fits(qdata, {shape[0], row_bytes}), "masquant: ",
                in_features, " channels of ", weight_bits, " bits take ", row_bytes,
                " bytes a row, the weight has shape ", shape, ".");
    TORCH_CHECK(qdata.scalar_type() == (packed ? at::kByte : at::kChar),
                "masquant: weights of ", weight_bits, " bits are ",
                packed ? "uint8" : "int8", ", not ", qdata.scalar_type(), ".");
    const bool apart = stack.leading == 1 && stack.count > 0;
    tensor_ = apart && qdata.select(0, 0).is_contiguous() ? qdata : qdata.contiguous();
    stride_ = apart ? tensor_.stride(0) : 0;
    first = {static_cast<const uint8_t*>(tensor_.const_data_ptr()), packed, in_features, shape[0],
             row_bytes};
  }

  Weights operator[](int64_t expert) const {
    Weights weights = first;
    weights.data += expert * stride_;
    return weights;
  }

  Stack stack;
  Weights first;

 private:
  Tensor tensor_;
  int64_t stride_;
};

int64_t checked_groups(const Tensor& scale, const Matrices& weights) {
  const int64_t out_features = weights.first.out_features;
  const int64_t in_features = weights.first.in_features;
  const at::IntArrayRef shape = weights.stack.own_shape(scale);
  TORCH_CHECK(shape.size() == 2 && weights.stack.fits(scale, {out_features, shape[1]}) &&
                  shape[1] > 0 && in_features % shape[1] == 0,
              "masquant: scales of shape ", shape, " do not fit a weight of ", out_features,
              " by ", in_features, ".");
  return shape[1];
}

void check_rotation(int64_t hadamard_size, int64_t in_features) {
  TORCH_CHECK_VALUE(hadamard_size >= 1 && (hadamard_size & (hadamard_size - 1)) == 0 &&
                        in_features % hadamard_size == 0,
                    "masquant: hadamard_size must be a power of two that divides the input "
                    "width, or 1, got ",
                    hadamard_size, " for an input width of ", in_features, ".");
}

// Whether tokens read the stored weights as they are.
bool reads_stored(int64_t tokens, bool packed, int64_t in_features, int64_t groups) {
  if (tokens > (groups == 1 ? kStoredTokens : kStoredTokensOfGroups)) return false;
  return groups == 1 || (packed && in_features / groups % kBlock == 0);
}

bool multiplies_bfloat16(int64_t tokens, Type type) {
  return kAllKernels && use_bfloat16 && type == Type::kBFloat16 && tokens > kFewTokens;
}

// Whether tokens that are not quantized become integers of planes, and read packed weights
// as they are.
bool reads_stored_floats(int64_t tokens, bool packed, int64_t width, Type type) {
  return packed && width % kBlock == 0 && width > 0 &&
         tokens <= (type == Type::kFloat32 ? kFewTokens : kStoredTokensOfGroups);
}

// Whether they do, and read packed weights in columns.
bool reads_columns(int64_t tokens, bool packed, int64_t width, Type type) {
  return packed && width % 32 == 0 && width > 0 && type != Type::kFloat32 &&
         !multiplies_bfloat16(tokens, type);
}

// Whether tokens meet a matrix by AMX, whose products are of 64 channels of a group.
bool multiplies_tiles(int64_t tokens, bool packed, int64_t in_features, int64_t groups) {
  return use_tiles && tokens > (packed ? kWithoutTilesOfPacked : kWithoutTiles) &&
         (groups == 1 || in_features / groups % 64 == 0);
}

// Whether tokens of bfloat16 that are not quantized do: few of them lose less in planes.
bool multiplies_bfloat16_tiles(int64_t tokens, bool packed, int64_t in_features,
                               int64_t groups) {
  return tokens > kFewTokens && multiplies_tiles(tokens, packed, in_features, groups);
}

// How tokens meet a matrix.
enum class Method { kStored, kColumns, kTiles };

Method method_of(int64_t tokens, bool packed, int64_t in_features, int64_t groups) {
  if (multiplies_tiles(tokens, packed, in_features, groups)) return Method::kTiles;
  return reads_stored(tokens, packed, in_features, groups) ? Method::kStored
                                                           : Method::kColumns;
}

std::string kernel_of(int64_t weight_bits, int64_t act_bits, int64_t tokens,
                      int64_t in_features, int64_t groups) {
  const bool packed = weight_bits <= 4;
  const std::string weights = packed ? "packed int4" : "int8";
  const std::string processor = kAllKernels ? "VNNI" : kProcessor;
  const bool tiles = multiplies_tiles(tokens, packed, in_features, groups);
  if (act_bits == 16) {
    const int64_t width = in_features / groups;
    if (multiplies_bfloat16_tiles(tokens, packed, in_features, groups)) {
      return "float32, of bfloat16 tokens AMX bfloat16, " + weights + " in tiles";
    }
    if (reads_stored_floats(tokens, packed, width, Type::kBFloat16)) {
      return processor + ", planes of 8 bits, " + weights + " as stored";
    }
    if (reads_columns(tokens, packed, width, Type::kBFloat16)) {
      return processor + ", planes of 8 bits, " + weights + " in columns";
    }
    const std::string type =
        multiplies_bfloat16(tokens, Type::kBFloat16) ? "float32, of bfloat16 tokens bfloat16, "
                                                     : "float32, ";
    return type + weights + " unpacked by panels";
  }
  if (method_of(tokens, packed, in_features, groups) == Method::kStored) {
    return processor + ", " + weights + " as stored";
  }
  return (tiles ? "AMX, " + weights + " in tiles" : processor + ", " + weights + " in columns") +
         (groups > 1 ? ", group by group" : "");
}

// ---- what is added to the product, and where the result goes ----

class Results {
 public:
  // Of each expert: l2 (R, N), modality_bias (M, N), bias (N,).
  Results(const Experts& experts, int64_t tokens, const Matrices& weights,
          at::ScalarType out_dtype, const Tensor& like, const MaybeTensor& hidden,
          const MaybeTensor& l2, const MaybeTensor& modality_bias, const MaybeTensor& ids,
          const MaybeTensor& bias)
      : of_integers_(like.scalar_type() == at::kChar),
        out_features_(weights.first.out_features),
        wanted_(out_dtype),
        order(tokens),
        token(tokens) {
    const Stack& stack = weights.stack;
    const bool direct =
        out_dtype == at::kFloat || out_dtype == at::kBFloat16 || out_dtype == at::kHalf;
    out_ = at::empty({tokens, out_features_},
                     like.options().dtype(direct ? out_dtype : at::kFloat));
    std::iota(order.begin(), order.end(), 0);
    if (hidden) {
      TORCH_CHECK(l2, "masquant: a low-rank hidden state comes with up-projections.");
      TORCH_CHECK(hidden->dim() == 2 && hidden->size(0) == tokens &&
                      stack.fits(*l2, {hidden->size(1), out_features_}),
                  "masquant: a hidden state of shape ", hidden->sizes(),
                  " and up-projections of shape ", stack.own_shape(*l2), " do not fit ", tokens,
                  " tokens and ", out_features_, " output channels.");
      hidden_ = floats(*hidden);
      l2_ = readable(*l2, true);
    }
    if (bias) {
      TORCH_CHECK(stack.fits(*bias, {out_features_}), "masquant: ", out_features_,
                  " output channels have a bias of shape ", stack.own_shape(*bias), ".");
      bias_ = readable(*bias, false);
    }
    if (modality_bias) {
      const at::IntArrayRef shape = stack.own_shape(*modality_bias);
      TORCH_CHECK(shape.size() == 2 && shape[0] > 0 &&
                      stack.fits(*modality_bias, {shape[0], out_features_}),
                  "masquant: ", out_features_,
                  " output channels have modality biases of shape ", shape, ".");
      modalities_ = shape[0];
      modality_bias_ = readable(*modality_bias, false);
      if (ids) ids_ = checked_ids(*ids, tokens, modalities_);
    }
    describe_tokens(experts);
  }

  // Puts the columns [n, n + kColumns) of an expert into place; arrays holds array_size()
  // floats.
  Finish finish(int64_t expert, int64_t n, float* arrays) const {
    Finish f;
    f.columns = static_cast<int>(std::min<int64_t>(kColumns, out_features_ - n));
    f.out_type = type_of(out_);
    if (bias_.defined()) {
      float_panel(bias_.const_data_ptr(), type_of(bias_), out_features_, expert, 1, n, f.columns,
                  arrays);
      f.bias = arrays;
      arrays += kColumns;
    }
    if (modality_bias_.defined()) {
      const int64_t used = ids_.defined() ? modalities_ : 1;
      float_panel(modality_bias_.const_data_ptr(), type_of(modality_bias_), out_features_,
                  expert * modalities_, used, n, f.columns, arrays);
      f.modality_bias = arrays;
      arrays += used * kColumns;
    }
    if (!any_hidden_) return f;
    const int64_t rank = hidden_.size(1);
    if constexpr (kAllKernels) {
      if (in_planes()) {
        uint8_t* bytes = reinterpret_cast<uint8_t*>(arrays);
        byte_panel(l2_.const_data_ptr<int8_t>(), out_features_, expert * rank, rank, n,
                   f.columns, bytes);
        f.up_bytes = bytes;
        return f;
      }
    }
    float_panel(l2_.const_data_ptr(), type_of(l2_), out_features_, expert * rank, rank, n,
                f.columns, arrays);
    f.up = arrays;
    return f;
  }

  int64_t array_size() const {
    return kColumns *
           (1 + modalities_ + (any_hidden_ ? round_up(hidden_.size(1), 4) : 0));
  }

  // Tokens [first, first + rows) of the order, at column n.
  void place(int64_t first, int rows, int64_t n, Token* tile) const {
    for (int r = 0; r < rows; ++r) {
      tile[r] = token[order[first + r]];
      tile[r].out = static_cast<char*>(tile[r].out) + n * out_.element_size();
    }
  }

  Tensor take() { return wanted_ == out_.scalar_type() ? out_ : out_.to(wanted_); }

 private:
  void describe_tokens(const Experts& experts) {
    const int64_t tokens = static_cast<int64_t>(token.size());
    const int64_t rank = hidden_.defined() ? hidden_.size(1) : 0;
    const float* hidden = hidden_.defined() ? hidden_.const_data_ptr<float>() : nullptr;
    const int32_t* ids = ids_.defined() ? ids_.const_data_ptr<int32_t>() : nullptr;
    char* out = static_cast<char*>(out_.mutable_data_ptr());
    for (int64_t t = 0; t < tokens; ++t) {
      Token& at = token[t];
      at = {1.0f, 0, ids == nullptr ? 0 : ids[t], 0, 0, hidden + t * rank,
            out + t * out_features_ * out_.element_size(), nullptr};
      uint32_t any = 0;
      const uint32_t* bits = reinterpret_cast<const uint32_t*>(at.hidden);
      for (int64_t r = 0; r < rank; ++r) any |= bits[r];
      if (any != 0) {
        any_hidden_ = true;
        at.end = static_cast<int32_t>(rank);
        while (bits[at.begin] == 0) ++at.begin;
        while (bits[at.end - 1] == 0) --at.end;
      }
    }
    // Rows behind the last expert's are of experts elsewhere.
    const int64_t known = experts.empty() ? 0 : experts.back().end;
    const int64_t row_bytes = out_features_ * out_.element_size();
    if (known < tokens) std::memset(out + known * row_bytes, 0, (tokens - known) * row_bytes);
    if (any_hidden_ && in_planes()) split_hidden(rank);
    for (const Expert& expert : experts) {
      if (!any_hidden_) break;
      // Tokens of one modality side by side: a tile does its modalities' work only.
      const auto begin = order.begin();
      std::stable_sort(begin + expert.begin, begin + expert.end, [&](int64_t a, int64_t b) {
        const auto rank_of = [&](int64_t t) {
          return token[t].begin < token[t].end ? token[t].begin : -1;
        };
        return rank_of(a) < rank_of(b);
      });
    }
  }

  // Whether hidden states meet up-projections as integers.
  bool in_planes() const { return kAllKernels && type_of(l2_) == Type::kInt8; }

  // As many bits as the tokens and the results have.
  void split_hidden(int64_t rank) {
    const int64_t tokens = static_cast<int64_t>(token.size()), length = round_up(rank, 4);
    const int count = type_of(out_) == Type::kFloat32 ? 3 : of_integers_ ? 1 : 2;
    bytes_.assign(tokens * count * length, 0);
    planes_.resize(tokens);
    std::vector<float> padded(length);
    for (int64_t t = 0; t < tokens; ++t) {
      if (token[t].begin == token[t].end) continue;
      std::copy_n(token[t].hidden, rank, padded.begin());
      split_numbers(padded.data(), length, count, bytes_.data() + t * count * length, &planes_[t]);
      token[t].planes = &planes_[t];
    }
  }

  //: whether tokens are quantized
  bool of_integers_;
  int64_t out_features_, modalities_ = 0;
  at::ScalarType wanted_;
  std::vector<int8_t> bytes_;
  std::vector<Planes> planes_;
  Tensor out_, hidden_, l2_, bias_, modality_bias_, ids_;
  bool any_hidden_ = false;

 public:
  std::vector<int64_t> order;
  std::vector<Token> token;
};

// ---- smooth_quantize ----

std::tuple<Tensor, Tensor> smooth_quantize(const Tensor& x, const Tensor& act_pre_scale,
                                           const MaybeTensor& modality_ids,
                                           int64_t act_bits,
                                           const MaybeTensor& act_shift,
                                           int64_t hadamard_size) {
  check_processor();
  TORCH_CHECK(x.dim() == 2 && act_pre_scale.dim() == 2 &&
                  act_pre_scale.size(1) == x.size(1) && act_pre_scale.size(0) > 0,
              "masquant: smoothing factors of shape ", act_pre_scale.sizes(),
              " do not fit tokens of shape ", x.sizes(), ".");
  TORCH_CHECK(act_bits >= 2 && act_bits <= 8, "masquant: activations have 2 to 8 bits, got ",
              act_bits, ".");
  const int64_t tokens = x.size(0), in_features = x.size(1);
  check_rotation(hadamard_size, in_features);
  const Tensor rows = readable_rows(x), pre_scale = floats(act_pre_scale);
  Tensor shift, ids;
  if (act_shift) {
    TORCH_CHECK(act_shift->sizes() == act_pre_scale.sizes(), "masquant: shifts of shape ",
                act_shift->sizes(), " beside smoothing factors of shape ",
                act_pre_scale.sizes(), ".");
    shift = floats(*act_shift);
  }
  if (modality_ids) ids = checked_ids(*modality_ids, tokens, pre_scale.size(0));
  Tensor q = at::empty({tokens, in_features}, x.options().dtype(at::kChar));
  Tensor scale = at::empty({tokens, 1}, x.options().dtype(at::kFloat));
  const int quant_max = (1 << (act_bits - 1)) - 1;
  const Type type = type_of(rows);
  int8_t* out = q.mutable_data_ptr<int8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  const int64_t grain = 1 + 8192 / (in_features + 1);
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(kRow, round_up(in_features, 16));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m = ids.defined() ? ids.const_data_ptr<int32_t>()[t] : 0;
      quantize_row(row_of(rows, t), type, pre_scale.const_data_ptr<float>() + m * in_features,
                   shift.defined() ? shift.const_data_ptr<float>() + m * in_features : nullptr,
                   in_features, hadamard_size, quant_max, row, out + t * in_features, scales + t);
    }
  });
  return {q, scale};
}

// ---- low_rank_down ----

// What projects the tokens of a matrix down: the modalities' columns side by side.
struct Down {
  const void* l1;  // (K, R)
  Type type;
  int64_t in_features, rank;
  at::IntArrayRef ranks;
  const float* column_scale;  // (R,) or null
};

// Those of experts: l1 (K, R) and low_rank_scale (R,) of each.
class Downs {
 public:
  Downs(const Stack& stack, const Tensor& l1, int64_t in_features, const Tensor& modality_ids,
        int64_t tokens, at::IntArrayRef ranks, const MaybeTensor& low_rank_scale)
      : in_features_(in_features), ranks_(ranks) {
    const at::IntArrayRef shape = stack.own_shape(l1);
    TORCH_CHECK(shape.size() == 2 && stack.fits(l1, {in_features, shape[1]}),
                "masquant: down-projections of shape ", shape, " do not fit ", in_features,
                " channels.");
    rank_ = shape[1];
    const bool fit =
        std::all_of(ranks.begin(), ranks.end(), [](int64_t r) { return r >= 0; }) &&
        std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == rank_;
    TORCH_CHECK(fit, "masquant: ranks ", ranks, " do not add up to ", rank_, ".");
    TORCH_CHECK(modality_ids.dim() == 1 && modality_ids.size(0) == tokens, "masquant: ",
                tokens, " tokens have modality ids of shape ", modality_ids.sizes(), ".");
    TORCH_CHECK(!low_rank_scale || low_rank_scale->numel() == stack.count * rank_, "masquant: ",
                rank_, " columns have low-rank scales of shape ",
                low_rank_scale ? stack.own_shape(*low_rank_scale) : at::IntArrayRef(), ".");
    l1_ = readable(l1, true);
    ids_ = modality_ids.to(at::kInt).contiguous();
    if (low_rank_scale) scale_ = floats(*low_rank_scale);
  }

  Down operator[](int64_t expert) const {
    const char* data = static_cast<const char*>(l1_.const_data_ptr());
    return {data + expert * in_features_ * rank_ * static_cast<int64_t>(l1_.element_size()),
            type_of(l1_), in_features_, rank_, ranks_,
            scale_.defined() ? scale_.const_data_ptr<float>() + expert * rank_ : nullptr};
  }

  const int32_t* ids() const { return ids_.const_data_ptr<int32_t>(); }

  // Hidden states (T, R).
  Tensor zeros(int64_t tokens) const {
    return at::zeros({tokens, rank_}, l1_.options().dtype(at::kFloat));
  }

 private:
  int64_t in_features_, rank_ = 0;
  at::IntArrayRef ranks_;
  Tensor l1_, ids_, scale_;
};

// Tokens of each modality but the base.
std::vector<std::vector<int64_t>> tokens_of_each(const int32_t* id, int64_t tokens,
                                                 size_t modalities) {
  std::vector<std::vector<int64_t>> rows(modalities);
  for (int64_t t = 0; t < tokens; ++t) {
    if (id[t] >= 1 && id[t] <= static_cast<int64_t>(modalities)) rows[id[t] - 1].push_back(t);
  }
  return rows;
}

// Writes to out (T, R), which is zeros, what belongs to a token's modality. source(t, k,
// count, out) gives a token's channels as floats, blocks of a multiple of least_depth, a
// power of two; token_scale(t) what multiplies its products.
template <class Source, class TokenScale>
void project_down(const Down& of, const int32_t* ids, int64_t tokens, int64_t least_depth,
                  const Source& source, const TokenScale& token_scale, float* out) {
  const int64_t in_features = of.in_features, rank = of.rank;
  const auto rows_of_each = tokens_of_each(ids, tokens, of.ranks.size());

  constexpr int64_t kTokensOfTask = 8 * kRows, kDepth = 128;
  int64_t start = 0;
  for (size_t m = 0; m < of.ranks.size(); start += of.ranks[m], ++m) {
    const std::vector<int64_t>& rows = rows_of_each[m];
    if (rows.empty() || of.ranks[m] == 0) continue;
    const int64_t columns = of.ranks[m], panels = (columns + kColumns - 1) / kColumns;
    // [panel][K][kColumns]
    float* down = scratch<float>(kShared, panels * in_features * kColumns);
    const int64_t blocks = (in_features + kDepth - 1) / kDepth;
    at::parallel_for(0, panels * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / blocks, k = task % blocks * kDepth;
        float_panel(of.l1, of.type, rank, k, std::min(kDepth, in_features - k),
                    start + p * kColumns, std::min<int64_t>(kColumns, columns - p * kColumns),
                    down + (p * in_features + k) * kColumns);
      }
    });
    const int64_t count = static_cast<int64_t>(rows.size());
    const int64_t tasks = (count + kTokensOfTask - 1) / kTokensOfTask;
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t most = std::max(kDepth, least_depth);
      float* a = scratch<float>(kRow, kRows * most);
      float* c = scratch<float>(kProducts, kTokensOfTask * panels * kColumns);
      const float* pointers[kRows];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kTokensOfTask, last = std::min(count, first + kTokensOfTask);
        for (int64_t k = 0; k < in_features; k += most) {
          const int64_t depth = std::min(most, in_features - k);
          for (int64_t t = first; t < last; t += kRows) {
            const int n = static_cast<int>(std::min<int64_t>(kRows, last - t));
            for (int r = 0; r < n; ++r) {
              source(rows[t + r], k, depth, a + r * most);
              pointers[r] = a + r * most;
            }
            for (int64_t p = 0; p < panels; ++p) {
              multiply_float_panel(pointers, n, down + (p * in_features + k) * kColumns, depth,
                                   std::min<int64_t>(kColumns, columns - p * kColumns), k > 0,
                                   c + ((t - first) * panels + p * kRows) * kColumns);
            }
          }
        }
        for (int64_t t = first; t < last; ++t) {
          const int64_t row = rows[t];
          const float s = token_scale(row);
          const int64_t tile = (t - first) / kRows * kRows, r = (t - first) % kRows;
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t p = j / kColumns;
            float v = c[(tile * panels + p * kRows + r) * kColumns + j % kColumns] * s;
            if (of.column_scale != nullptr) v *= of.column_scale[start + j];
            out[row * rank + start + j] = v;
          }
        }
      }
    });
  }
}

// Of these the preprocessor decides: a build that is not optimized keeps a function whose
// calls are discarded, and would look for its kernels.
#ifdef __AVX512VNNI__
// The same of int8 by int8, K a multiple of 4: sums are exact, and rounded once.
void project_integers_down(const Down& of, const int8_t* q, const float* scales,
                           const int32_t* ids, int64_t tokens, float* out) {
  const int64_t in_features = of.in_features, rank = of.rank;
  const auto rows_of_each = tokens_of_each(ids, tokens, of.ranks.size());
  int64_t start = 0;
  for (size_t m = 0; m < of.ranks.size(); start += of.ranks[m], ++m) {
    const std::vector<int64_t>& rows = rows_of_each[m];
    if (rows.empty() || of.ranks[m] == 0) continue;
    const int64_t columns = of.ranks[m], panels = (columns + kColumns - 1) / kColumns;
    const int64_t count = static_cast<int64_t>(rows.size());
    // [panel][K / 4][kColumns][4]
    uint8_t* down = scratch<uint8_t>(kShared, panels * in_features * kColumns);
    constexpr int64_t kDepth = 512;
    const int64_t blocks = (in_features + kDepth - 1) / kDepth;
    at::parallel_for(0, panels * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / blocks, k = task % blocks * kDepth;
        byte_panel(static_cast<const int8_t*>(of.l1), rank, k, std::min(kDepth, in_features - k),
                   start + p * kColumns, std::min<int64_t>(kColumns, columns - p * kColumns),
                   down + (p * in_features + k) * kColumns);
      }
    });
    at::parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      alignas(64) int32_t c[kRows * kColumns];
      const int8_t* pointers[kRows];
      int32_t excess[kRows];
      for (int64_t tile = begin; tile < end; ++tile) {
        const int n = static_cast<int>(std::min<int64_t>(kRows, count - tile * kRows));
        for (int r = 0; r < n; ++r) {
          pointers[r] = q + rows[tile * kRows + r] * in_features;
          // In 32 bits that wrap around: only the exact product has to fit.
          excess[r] = static_cast<int32_t>(
              128u * static_cast<uint32_t>(sum_row(pointers[r], in_features)));
        }
        for (int64_t p = 0; p < panels; ++p) {
          multiply_panel(pointers, n, down + p * in_features * kColumns, in_features, c);
          for (int r = 0; r < n; ++r) {
            const int64_t t = rows[tile * kRows + r];
            for (int64_t j = 0; j < kColumns && p * kColumns + j < columns; ++j) {
              const int64_t at = start + p * kColumns + j;
              const auto exact = static_cast<int32_t>(
                  static_cast<uint32_t>(c[r * kColumns + j]) - static_cast<uint32_t>(excess[r]));
              const float v = static_cast<float>(exact) * scales[t];
              out[t * rank + at] = of.column_scale != nullptr ? v * of.column_scale[at] : v;
            }
          }
        }
      }
    });
  }
}
#endif

// Of quantized tokens.
void project_quantized_down(const Down& of, const int8_t* q, const float* scales,
                            const int32_t* ids, int64_t tokens, float* out) {
  const int64_t width = of.in_features;
#ifdef __AVX512VNNI__
  if (of.type == Type::kInt8 && width % 4 == 0) {
    return project_integers_down(of, q, scales, ids, tokens, out);
  }
#endif
  project_down(
      of, ids, tokens, 1,
      [=](int64_t t, int64_t k, int64_t count, float* channels) {
        to_float(q + t * width + k, count, channels);
      },
      [=](int64_t t) { return scales[t]; }, out);
}

void check_quantized(const Tensor& q, const Tensor& scale) {
  TORCH_CHECK(q.dim() == 2 && q.scalar_type() == at::kChar && scale.numel() == q.size(0),
              "masquant: quantized tokens are (T, K) int8 with T scales, got ", q.sizes(), " ",
              q.scalar_type(), " and ", scale.sizes(), ".");
}

Tensor low_rank_down(const Tensor& qdata, const Tensor& scale, const Tensor& l1,
                     const Tensor& modality_ids, at::IntArrayRef ranks,
                     const MaybeTensor& low_rank_scale) {
  check_quantized(qdata, scale);
  const Tensor q = qdata.contiguous(), s = floats(scale);
  const int64_t tokens = q.size(0);
  const Downs down(kLinear, l1, q.size(1), modality_ids, tokens, ranks, low_rank_scale);
  Tensor hidden = down.zeros(tokens);
  project_quantized_down(down[0], q.const_data_ptr<int8_t>(), s.const_data_ptr<float>(),
                         down.ids(), tokens, hidden.mutable_data_ptr<float>());
  return hidden;
}

// ---- int_linear ----

// Few tokens of an expert, at the columns from n: multiply(finish, products, sums) writes
// to the one or the other, which are the same memory: integers, and their scale to finish,
// or floats.
template <class Multiply>
void multiply_few(const Results& results, const Expert& expert, int64_t n,
                  const Multiply& multiply) {
  float* arrays = scratch<float>(kArrays, results.array_size());
  int32_t* products = scratch<int32_t>(kProducts, kFewTokens * kColumns);
  float* sums = reinterpret_cast<float*>(products);
  Token tile[kRows];
  Finish finish = results.finish(expert.number, n, arrays);
  multiply(finish, products, sums);
  for (int64_t t = 0; t < expert.rows(); t += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, expert.rows() - t));
    results.place(expert.begin + t, rows, n, tile);
    if (finish.scale != nullptr) {
      finish_integers(finish, products + t * kColumns, tile, rows);
    } else {
      finish_floats(finish, sums + t * kColumns, tile, rows);
    }
  }
}

// Blocks of channels, kBlock at most, that end where groups do.
class Blocks {
 public:
  struct Block {
    int64_t group, k, width;
    //: of a token's steps, where the block's begin, and how many there are
    int64_t first_step, steps;
    //: whether it is a group's first and last
    bool begins, ends;
  };

  Blocks(const Weights& weights, int64_t groups) {
    const int64_t width = weights.in_features / groups;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t k = 0; k < width; k += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, width - k);
        blocks_.push_back({g, g * width + k, count, steps, column_steps(weights.packed, count), k == 0,
                           k + count == width});
        steps += blocks_.back().steps;
      }
    }
  }

  auto begin() const { return blocks_.begin(); }
  auto end() const { return blocks_.end(); }
  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }

  // Unpacks a block of the columns from n, and asks for its share of the next ones: they
  // are one piece of memory, in the order that the hardware reads fastest.
  void unpack(const Block& block, const Weights& weights, int64_t n, uint8_t* panel) const {
    const int64_t share = block.k / (weights.packed ? 2 : 1);
    const uint8_t* next = weights.data + (n + kColumns) * weights.row_bytes + kColumns / 4 * share;
    column_panel(weights, n, block.k, block.width, next, panel);
  }

  //: of a token
  int64_t steps = 0;

 private:
  std::vector<Block> blocks_;
};

// Tokens [first, first + rows) of the order, that are multiplied at once.
struct Tile {
  const Expert* expert;
  int64_t first;
  int rows;
  //: where their copies are, in copies of a token
  int64_t place;
};

//: tokens of a task by AMX: more would leave their sums no room in the second-level cache
constexpr int64_t kMostTiled = 512;

#ifdef __AVX512VNNI__
// The tokens of a task by AMX, tiles of tokens of which one begins stride
// bytes behind the other.
struct TiledTokens {
  const int8_t* data;
  int64_t stride, count;
};

// Sums [panels][tiles][kColumns][kTile] of panels from column 0 on by tiles of tokens.
// unpack(panel, k, width, out) makes tiles of weights; steps are of channels_of_step. Parts
// of the channels take turns, small enough for the first-level cache to keep a panel's
// half, and the second one the tokens'. scales of groups: [panels][groups][kColumns].
// Where stored is not null, it has the panels' rows as they are stored, row_bytes each.
template <class Unpack>
void* sums_of_tiles(const TiledTokens& tokens, int64_t panels, int64_t in_features,
                    int64_t groups, int channels_of_step, const float* scales,
                    const Unpack& unpack, const uint8_t* stored = nullptr,
                    int64_t row_bytes = 0) {
  const bool bfloat16 = channels_of_step == 32;
  const int64_t width = in_features / groups;
  int64_t depth = kTileDepth / (bfloat16 ? 2 : 1);
  if (scales != nullptr) depth = std::max(width, depth / width * width);
  if (stored != nullptr) depth = in_features;
  const int64_t most = std::min(depth, round_up(in_features, 64)) / channels_of_step;
  int8_t* panel = scratch<int8_t>(kPanel, most * kColumns * 64);
  const int64_t size = tokens.count * kColumns * kTile;
  float* sums = scratch<float>(kProducts, panels * size);
  if (scales != nullptr || in_features == 0) std::memset(sums, 0, panels * size * sizeof(float));
  for (int64_t k = 0; k < in_features; k += depth) {
    const int64_t count = std::min(depth, in_features - k);
    for (int64_t p = 0; p < panels; ++p) {
      TileProduct product;
      if (stored != nullptr) {
        product.panel = reinterpret_cast<const int8_t*>(stored + p * kColumns * row_bytes);
        product.row_bytes = row_bytes;
      } else {
        unpack(p, k, count, panel);
        product.panel = panel;
      }
      product.tokens = tokens.data + k / channels_of_step * kTileBytes;
      product.token_stride = tokens.stride;
      product.steps = round_up(count, 64) / channels_of_step;
      product.sums = sums + p * size;
      product.add = k > 0;
      if (scales != nullptr) {
        product.scale = scales + (p * groups + k / width) * kColumns;
        product.steps_of_group = width / channels_of_step;
      }
      multiply_tiles(product, bfloat16, tokens.count);
    }
  }
  return sums;
}

// Puts the sums of a tile's tokens, the rows from first on of the order, at column n.
void finish_sums(const Finish& finish, const char* sums, const Results& results, int64_t first,
                 int rows_of_tile, int64_t n) {
  alignas(64) int32_t c[kTile * kColumns];
  rows_of_tiles(sums, c);
  Token tokens[kRows];
  for (int r = 0; r < rows_of_tile; r += kRows) {
    const int rows = std::min(kRows, rows_of_tile - r);
    results.place(first + r, rows, n, tokens);
    if (finish.scale != nullptr) {
      finish_integers(finish, c + r * kColumns, tokens, rows);
    } else {
      finish_floats(finish, reinterpret_cast<float*>(c + r * kColumns), tokens, rows);
    }
  }
}

// How many panels a task has: one, or where the tokens outgrow the second-level cache as
// many as their sums leave room for, so that each part of the tokens is read for all.
int64_t panels_of_task(int64_t panels, int64_t tokens, int64_t bytes_of_token) {
  constexpr int64_t kBytes = 1 << 20;
  if (tokens * bytes_of_token <= kBytes) return 1;
  const int64_t most = std::max<int64_t>(1, panels / (4 * at::get_num_threads()));
  return std::clamp<int64_t>(kBytes / (tokens * kColumns * 4), 1, most);
}
#endif

// Quantized tokens by the matrices of their experts.
class IntegerProduct {
 public:
  // scale: (N, G) of each, contiguous as q is; both outlive this.
  IntegerProduct(const Experts& experts, const Tensor& q, const Matrices& weights,
                 const Tensor& scale, int64_t groups, Results& results)
      : experts_(experts),
        q_(q.const_data_ptr<int8_t>()),
        weights_(weights),
        scale_(scale.const_data_ptr<float>()),
        in_features_(q.size(1)),
        groups_(groups),
        blocks_(weights.first, groups),
        results_(results) {}

  void run() {
    const std::vector<Task> tasks = split();
    prepare();
    const int64_t count = static_cast<int64_t>(tasks.size());
    const int64_t columns = weights_.first.out_features;
    const int64_t rows = experts_.back().end * ((columns + kColumns - 1) / kColumns) / count;
    share(count, panels_of_thread(rows, in_features_), [&](int64_t begin, int64_t end) {
#ifdef __AVX512VNNI__
      std::optional<Tiles> shapes;
#endif
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = tasks[i];
        switch (method_of(*task.expert)) {
          case Method::kStored:
            multiply_as_stored(task);
            break;
          case Method::kColumns:
            multiply_in_columns(task);
            break;
          case Method::kTiles:
#ifdef __AVX512VNNI__
            if (!shapes) shapes.emplace();
            multiply_in_tiles(task);
#endif
            break;
        }
      }
    });
  }

 private:
  // Columns from n, of so many panels, by the tiles [first, last).
  struct Task {
    const Expert* expert;
    int64_t n, panels, first, last;
  };

  Method method_of(const Expert& expert) const {
    return masquant::method_of(expert.rows(), weights_.first.packed, in_features_, groups_);
  }

  // Enough tasks for all threads, and no more chunks of tokens than that, as each unpacks
  // its panel anew.
  std::vector<Task> split() {
    const int64_t columns = weights_.first.out_features;
    const int64_t panels = (columns + kColumns - 1) / kColumns;
    const int64_t all = panels * static_cast<int64_t>(experts_.size());
    const int64_t wanted = (2 * at::get_num_threads() + all - 1) / all;
    constexpr int64_t kLeastChunk = 96;
    std::vector<Task> tasks;
    tasks.reserve(all * wanted);
    places_ = 0;
    for (const Expert& expert : experts_) {
      const Method method = method_of(expert);
      const bool stored = method == Method::kStored, tiled = method == Method::kTiles;
      const int64_t rows = expert.rows();
      const int64_t most = std::max<int64_t>(1, rows / kLeastChunk);
      const int64_t chunks =
          stored ? 1
                 : std::max(std::min(wanted, most), tiled ? (rows + kMostTiled - 1) / kMostTiled : 1);
      const int64_t rows_of_tile = stored ? rows : tiled ? kTile : kRows;
      const int64_t first_tile = static_cast<int64_t>(tiles_.size());
      std::vector<int64_t> ends;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = rows * c / chunks, count = rows * (c + 1) / chunks - from;
        const int64_t tiles = (count + rows_of_tile - 1) / rows_of_tile;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t at = count * i / tiles;
          const int rows_of_this = static_cast<int>(count * (i + 1) / tiles - at);
          tiles_.push_back({&expert, expert.begin + from + at, rows_of_this, places_});
          places_ += tiled ? kTile : rows_of_this;
        }
        ends.push_back(static_cast<int64_t>(tiles_.size()));
      }
      int64_t step = 1;
#ifdef __AVX512VNNI__
      if (tiled) step = panels_of_task(panels, rows / chunks, in_features_);
#endif
      for (int64_t p = 0; p < panels; p += step) {
        int64_t first = first_tile;
        for (int64_t end : ends) {
          tasks.push_back({&expert, p * kColumns, std::min(step, panels - p), first, end});
          first = end;
        }
      }
    }
    return tasks;
  }

  // Makes of tokens what their products read, in the results' order.
  void prepare() {
    const int64_t tokens = experts_.back().end, padded = round_up(in_features_, kBlock);
    stride_ = std::max({stored_token_bytes(weights_.first.packed, in_features_),
                        4 * blocks_.steps, round_up(in_features_, 64)});
    copy_ = scratch<int8_t>(kTokens, places_ * stride_);
    start_stride_ = std::max(groups_, groups_ > 1 ? padded / kBlock * 16 : 0);
    starts_ = scratch<int32_t>(kShared, tokens * start_stride_);
    token_.resize(tokens);
    blocked_.resize(tokens);
    const int64_t count = static_cast<int64_t>(tiles_.size());
    at::parallel_for(0, count, 1 + 32768 / (in_features_ + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Tile& tile = tiles_[i];
        const Method method = method_of(*tile.expert);
        switch (method) {
          case Method::kStored:
            for (int r = 0; r < tile.rows; ++r) prepare_stored(tile.first + r, tile.place + r);
            break;
          case Method::kColumns:
            prepare_columns(tile);
            break;
          case Method::kTiles:
#ifdef __AVX512VNNI__
            prepare_tiles(tile);
#endif
            break;
        }
      }
    });
  }

  const int8_t* quantized(int64_t i) const { return q_ + results_.order[i] * in_features_; }

  void prepare_stored(int64_t i, int64_t place) {
    int8_t* to = copy_ + place * stride_;
    token_[i] = to;
    store_token(quantized(i), weights_.first.packed, in_features_, to);
    if (groups_ > 1) {
      int32_t* start = starts_ + i * start_stride_;
      start_blocks(to, in_features_, start);
      blocked_[i] = {to, nullptr, nullptr, start};
    } else {
      results_.token[results_.order[i]].sum = sum_row(quantized(i), in_features_);
    }
  }

  void prepare_columns(const Tile& tile) {
    const uint32_t offset = static_cast<uint32_t>(weights_.first.offset());
    int8_t* to = copy_ + tile.place * stride_;
    int32_t* start = starts_ + tile.first * start_stride_;
    const int64_t width = in_features_ / groups_;
    for (int r = 0; r < tile.rows; ++r) {
      const int8_t* from = quantized(tile.first + r);
      for (const Blocks::Block& block : blocks_) {
        interleave(from + block.k, block.width, weights_.first.packed, tile.rows,
                   to + 4 * (block.first_step * tile.rows + r));
      }
      for (int64_t g = 0; g < groups_; ++g) {
        // In 32 bits that wrap around: only the exact product has to fit.
        const uint32_t sum = static_cast<uint32_t>(sum_row(from + g * width, width));
        start[g * tile.rows + r] = static_cast<int32_t>(0u - offset * sum);
      }
    }
  }

#ifdef __AVX512VNNI__
  void prepare_tiles(const Tile& tile) {
    const int8_t* tokens[kTile];
    for (int r = 0; r < tile.rows; ++r) tokens[r] = quantized(tile.first + r);
    tile_tokens(tokens, tile.rows, weights_.first.packed, in_features_,
                copy_ + tile.place * stride_);
  }
#endif

  const float* scales_of(const Expert& expert, int64_t n) const {
    return scale_ + (expert.number * weights_.first.out_features + n) * groups_;
  }

  void multiply_as_stored(const Task& task) const {
    const Expert& expert = *task.expert;
    const Weights weights = weights_[expert.number];
    const int64_t n = task.n;
    const int rows = static_cast<int>(expert.rows());
    multiply_few(results_, expert, n, [&](Finish& finish, int32_t* products, float* sums) {
      if (groups_ > 1) {
        multiply_stored_blocks(weights, n, finish.columns, scales_of(expert, 0), nullptr, groups_,
                               1, blocked_.data() + expert.begin, rows, sums);
        return;
      }
      float* scales = scratch<float>(kFloats, kColumns);
      transpose_columns(scales_of(expert, n), 1, finish.columns, 1, scales);
      finish.scale = scales;
      finish.offset = weights.offset();
      multiply_stored(weights, n, finish.columns, token_.data() + expert.begin, rows, products);
    });
  }

  // Sums of a tile, [rows][kColumns].
  struct Sums {
    int32_t* products;
    float* scaled;  // of groups
  };

  void multiply_in_columns(const Task& task) const {
    const Expert& expert = *task.expert;
    const Weights weights = weights_[expert.number];
    Finish finish = results_.finish(expert.number, task.n,
                                    scratch<float>(kArrays, results_.array_size()));
    float* scales = scratch<float>(kFloats, groups_ * kColumns);
    transpose_columns(scales_of(expert, task.n), groups_, finish.columns, groups_, scales);
    finish.scale = groups_ == 1 ? scales : nullptr;

    // Either the first-level cache holds a block's panel and the sums of all tokens, or
    // the second one all panels, and the first those of a tile.
    const int64_t first = tiles_[task.first].first;
    const int64_t rows = tiles_[task.last - 1].first + tiles_[task.last - 1].rows - first;
    constexpr int64_t kRowsOfBlock = 48;
    const bool by_block = rows <= kRowsOfBlock;
    const int64_t size = (by_block ? rows : kRows) * kColumns;
    const int64_t bytes = 4 * blocks_.steps * kColumns;
    const int64_t bytes_of_block = 4 * column_steps(weights.packed, kBlock) * kColumns;
    uint8_t* panel = scratch<uint8_t>(kPanel, bytes_of_block + (by_block ? 0 : bytes));
    int32_t* products = scratch<int32_t>(kProducts, 2 * size);
    const Sums sums{products, reinterpret_cast<float*>(products + size)};
    if (by_block) {
      std::memset(products, 0, 2 * size * sizeof(int32_t));
      for (const Blocks::Block& block : blocks_) {
        blocks_.unpack(block, weights, task.n, panel);
        for (int64_t i = task.first; i < task.last; ++i) {
          multiply_block(block, tiles_[i], panel, scales, at(sums, tiles_[i].first - first));
        }
      }
      for (int64_t i = task.first; i < task.last; ++i) {
        finish_tile(finish, tiles_[i], task.n, at(sums, tiles_[i].first - first));
      }
      return;
    }
    for (const Blocks::Block& block : blocks_) {
      blocks_.unpack(block, weights, task.n, panel + 4 * block.first_step * kColumns);
    }
    const Blocks::Block all{0, 0, in_features_, 0, blocks_.steps, true, true};
    for (int64_t i = task.first; i < task.last; ++i) {
      if (groups_ == 1) {
        multiply_block(all, tiles_[i], panel, scales, sums);
      } else {
        std::memset(sums.scaled, 0, size * sizeof(float));
        for (const Blocks::Block& block : blocks_) {
          multiply_block(block, tiles_[i], panel + 4 * block.first_step * kColumns, scales, sums);
        }
      }
      finish_tile(finish, tiles_[i], task.n, sums);
    }
  }

  static Sums at(const Sums& sums, int64_t row) {
    return {sums.products + row * kColumns, sums.scaled + row * kColumns};
  }

  void multiply_block(const Blocks::Block& block, const Tile& tile, const uint8_t* panel,
                      const float* scales, const Sums& sums) const {
    ColumnProduct product;
    product.packed = weights_.first.packed;
    product.tokens = copy_ + tile.place * stride_ + 4 * block.first_step * tile.rows;
    product.panel = panel;
    product.start = starts_ + tile.first * start_stride_ + block.group * tile.rows;
    product.continues = !block.begins;
    product.c = sums.products;
    if (groups_ > 1 && block.ends) {
      product.sum = sums.scaled;
      product.scale = scales + block.group * kColumns;
    }
    multiply_columns(product, tile.rows, 1, block.steps);
  }

  void finish_tile(const Finish& finish, const Tile& tile, int64_t n, const Sums& sums) const {
    Token tokens[kRows];
    results_.place(tile.first, tile.rows, n, tokens);
    if (groups_ == 1) {
      finish_integers(finish, sums.products, tokens, tile.rows);
    } else {
      finish_floats(finish, sums.scaled, tokens, tile.rows);
    }
  }

#ifdef __AVX512VNNI__
  void multiply_in_tiles(const Task& task) const {
    const Expert& expert = *task.expert;
    const Weights weights = weights_[expert.number];
    const int64_t tiles = task.last - task.first, size = groups_ * kColumns;
    float* scales = scratch<float>(kFloats, task.panels * size);
    for (int64_t p = 0; p < task.panels; ++p) {
      const int64_t n = task.n + p * kColumns;
      const int64_t columns = std::min<int64_t>(kColumns, weights.out_features - n);
      transpose_columns(scales_of(expert, n), groups_, columns, groups_, scales + p * size);
    }
    const TiledTokens tokens{copy_ + tiles_[task.first].place * stride_, kTile * stride_, tiles};
    const char* sums = static_cast<const char*>(sums_of_tiles(
        tokens, task.panels, in_features_, groups_, 64, groups_ > 1 ? scales : nullptr,
        [&](int64_t p, int64_t k, int64_t width, int8_t* panel) {
          tile_weights(weights, task.n + p * kColumns, k, width, panel);
        },
        reads_stored_tiles(weights, task.n + (task.panels - 1) * kColumns, tiles)
            ? weights.data + task.n * weights.row_bytes
            : nullptr,
        weights.row_bytes));
    float* arrays = scratch<float>(kArrays, results_.array_size());
    for (int64_t p = 0; p < task.panels; ++p) {
      const int64_t n = task.n + p * kColumns;
      Finish finish = results_.finish(expert.number, n, arrays);
      if (groups_ == 1) finish.scale = scales + p * size;
      for (int64_t i = task.first; i < task.last; ++i, sums += 4 * kTileBytes) {
        finish_sums(finish, sums, results_, tiles_[i].first, tiles_[i].rows, n);
      }
    }
  }
#endif

  const Experts& experts_;
  const int8_t* q_;
  const Matrices& weights_;
  const float* scale_;
  int64_t in_features_, groups_;
  const Blocks blocks_;
  Results& results_;
  std::vector<Tile> tiles_;
  //: of tokens in the results' order: copies, stride_ bytes each; what sums begin with
  int64_t places_ = 0, stride_ = 0, start_stride_ = 0;
  int8_t* copy_ = nullptr;
  int32_t* starts_ = nullptr;
  //: of those that read weights as stored
  std::vector<const int8_t*> token_;
  std::vector<BlockedToken> blocked_;
};

// q (S, K) int8 and token_scale (S,), contiguous; all else as the operators have it.
Tensor multiply_quantized(const Stack& stack, const Experts& experts, const Tensor& q,
                          const Tensor& token_scale, const Tensor& qdata, const Tensor& scale,
                          const MaybeTensor& hidden, const MaybeTensor& l2,
                          const MaybeTensor& modality_bias, const MaybeTensor& modality_ids,
                          const MaybeTensor& bias, int64_t weight_bits,
                          at::ScalarType out_dtype) {
  const int64_t tokens = q.size(0);
  const Tensor channel_scale = floats(scale);
  const Matrices weights(stack, qdata, q.size(1), weight_bits);
  const int64_t groups = checked_groups(channel_scale, weights);
  Results results(experts, tokens, weights, out_dtype, q, hidden, l2, modality_bias,
                  modality_ids, bias);
  if (experts.empty() || weights.first.out_features == 0) return results.take();
  for (int64_t t = 0; t < tokens; ++t) {
    results.token[t].scale = token_scale.const_data_ptr<float>()[t];
  }
  IntegerProduct(experts, q, weights, channel_scale, groups, results).run();
  return results.take();
}

Tensor int_linear(const Tensor& qx, const Tensor& x_scale, const Tensor& qdata,
                  const Tensor& scale, const MaybeTensor& low_rank_hidden,
                  const MaybeTensor& l2, const MaybeTensor& modality_bias,
                  const MaybeTensor& modality_ids, const MaybeTensor& bias,
                  int64_t weight_bits, at::ScalarType out_dtype) {
  check_processor();
  check_quantized(qx, x_scale);
  return multiply_quantized(kLinear, one_expert(qx.size(0)), qx.contiguous(), floats(x_scale),
                            qdata, scale, low_rank_hidden, l2, modality_bias, modality_ids,
                            bias, weight_bits, out_dtype);
}

// ---- expert_int_linear ----

Tensor expert_int_linear(const Tensor& qx, const Tensor& x_scale, const Tensor& ends,
                         const Tensor& qdata, const Tensor& scale, const MaybeTensor& l1,
                         const MaybeTensor& l2, const MaybeTensor& modality_bias,
                         const MaybeTensor& modality_ids, const MaybeTensor& bias,
                         at::IntArrayRef ranks, int64_t weight_bits,
                         at::ScalarType out_dtype, const MaybeTensor& low_rank_scale) {
  check_processor();
  check_quantized(qx, x_scale);
  const Tensor q = qx.contiguous(), token_scale = floats(x_scale);
  const int64_t tokens = q.size(0), in_features = q.size(1);
  const Stack stack{qdata.size(0), 1};
  const Experts experts = experts_of(ends, stack.count, tokens);
  MaybeTensor hidden;
  if (l1 && l2 && modality_ids) {
    const Downs downs(stack, *l1, in_features, *modality_ids, tokens, ranks, low_rank_scale);
    hidden = downs.zeros(tokens);
    float* out = hidden->mutable_data_ptr<float>();
    const auto project = [&](const Expert& expert) {
      const Down down = downs[expert.number];
      const int64_t first = expert.begin;
      project_quantized_down(down, q.const_data_ptr<int8_t>() + first * in_features,
                             token_scale.const_data_ptr<float>() + first, downs.ids() + first,
                             expert.rows(), out + first * down.rank);
    };
    // Experts of many rows by all threads, one after the other, then the rest side by side.
    constexpr int64_t kMany = 96;
    for (const Expert& expert : experts) {
      if (expert.rows() > kMany) project(expert);
    }
    share(static_cast<int64_t>(experts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (experts[i].rows() <= kMany) project(experts[i]);
      }
    });
  }
  return multiply_quantized(stack, experts, q, token_scale, qdata, scale, hidden, l2, modality_bias,
                            modality_ids, bias, weight_bits, out_dtype);
}

// ---- weight_only_linear ----

// Few tokens, which read packed weights as they are stored. Their floats are rounded to
// integers of so many planes that it is beneath what the tokens' type can tell. smooth(t,
// out) writes a token's. False where one is not finite, and nothing is done.
template <class Smooth>
bool few_floats(const Smooth& smooth, int planes, const Weights& weights, const float* scale,
                const int8_t* zero, int64_t groups, Results& results) {
  const Expert all{0, 0, static_cast<int64_t>(results.token.size())};
  const int64_t tokens = all.rows();
  const int64_t in_features = weights.in_features, blocks = in_features / kBlock;
  int8_t* integers = scratch<int8_t>(kTokens, tokens * planes * in_features);
  int32_t* starts = scratch<int32_t>(kShared, tokens * blocks * (16 + 2));
  float* scales = reinterpret_cast<float*>(starts + tokens * blocks * 16);
  float* sums = scales + tokens * blocks;
  std::vector<BlockedToken> blocked(tokens);
  std::atomic<bool> finite{true};
  at::parallel_for(0, tokens, 1 + 16384 / (in_features + 1), [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(kRow, in_features);
    for (int64_t i = begin; i < end; ++i) {
      smooth(results.order[i], row);
      int8_t* to = integers + i * planes * in_features;
      float *scale_of = scales + i * blocks, *sum_of = sums + i * blocks;
      int32_t* start = starts + i * blocks * 16;
      if (!split_planes(row, in_features, planes, to, scale_of, sum_of, start)) finite = false;
      blocked[i] = {to, scale_of, sum_of, start};
    }
  });
  if (!finite) return false;
  const int64_t panels = (weights.out_features + kColumns - 1) / kColumns;
  share(panels, panels_of_thread(tokens, in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kColumns; n < end * kColumns; n += kColumns) {
      multiply_few(results, all, n, [&](Finish& finish, int32_t*, float* products) {
        multiply_stored_blocks(weights, n, finish.columns, scale, zero, groups, planes,
                               blocked.data(), static_cast<int>(tokens), products);
      });
    }
  });
  return true;
}

// Tokens of 16 bits by packed weights in columns. Each block's floats become integers of
// two planes. smooth(t, out) writes a token's. False where one is not finite: what has been
// written is to be written again.
template <class Smooth>
bool floats_in_columns(const Smooth& smooth, const Weights& weights, const float* scale,
                       const int8_t* zero, int64_t groups, Results& results) {
  const Blocks blocks(weights, groups);
  const int64_t in_features = weights.in_features;
  const int64_t panels = (weights.out_features + kColumns - 1) / kColumns;
  constexpr int64_t kChunk = 240;
  const int64_t tokens = static_cast<int64_t>(results.token.size());
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = tokens * chunk / chunks;
    const int64_t count = tokens * (chunk + 1) / chunks - first;
    const int64_t tiles = (count + kRows - 1) / kRows, stride = 8 * blocks.steps;
    const auto tile_from = [&](int64_t i) { return count * i / tiles; };
    // Of each tile: integers; and of each of its blocks starts, scales and sums [rows].
    int8_t* integers = scratch<int8_t>(kTokens, count * stride);
    int32_t* starts = scratch<int32_t>(kShared, 3 * count * blocks.size());
    float* scales_of_tokens = reinterpret_cast<float*>(starts + count * blocks.size());
    float* sums_of_tokens = scales_of_tokens + count * blocks.size();
    std::atomic<bool> finite{true};
    at::parallel_for(0, tiles, 1 + 4096 / (in_features + 1), [&](int64_t begin, int64_t end) {
      float* row = scratch<float>(kRow, in_features);
      alignas(64) int8_t bytes[2 * kBlock];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = tile_from(i);
        const int rows = static_cast<int>(tile_from(i + 1) - from);
        for (int r = 0; r < rows; ++r) {
          smooth(results.order[first + from + r], row);
          int64_t at = from * blocks.size() + r;
          for (const Blocks::Block& block : blocks) {
            Planes planes;
            split_numbers(row + block.k, block.width, 2, bytes, &planes);
            if (std::isnan(planes.scale)) finite = false;
            int8_t* to = integers + from * stride + 8 * block.first_step * rows + 4 * r;
            for (int p = 0; p < 2; ++p) {
              interleave(bytes + p * block.width, block.width, weights.packed, rows,
                         to + 4 * p * block.steps * rows);
            }
            const int32_t sum = 256 * planes.sums[0] + planes.sums[1];
            starts[at] = -weights.offset() * sum;
            scales_of_tokens[at] = planes.scale;
            sums_of_tokens[at] = static_cast<float>(sum) * planes.scale;
            at += rows;
          }
        }
      }
    });
    if (!finite) return false;
    share(panels, panels_of_thread(count, in_features), [&](int64_t begin, int64_t end) {
      float* arrays = scratch<float>(kArrays, results.array_size());
      float* sums = scratch<float>(kProducts, count * kColumns);
      uint8_t* panel = scratch<uint8_t>(kPanel, kBlock * kColumns);
      float* scales = scratch<float>(kFloats, 2 * groups * kColumns);
      float* zeros = scales + groups * kColumns;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = p * kColumns;
        const Finish finish = results.finish(0, n, arrays);
        transpose_columns(scale + n * groups, groups, finish.columns, groups, scales);
        for (int64_t g = 0; zero != nullptr && g < groups; ++g) {
          for (int c = 0; c < finish.columns; ++c) {
            const int64_t at = g * kColumns + c;
            zeros[at] = scales[at] * static_cast<float>(zero[(n + c) * groups + g]);
          }
        }
        std::memset(sums, 0, count * kColumns * sizeof(float));
        int64_t number = 0;
        for (const Blocks::Block& block : blocks) {
          blocks.unpack(block, weights, n, panel);
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = tile_from(i), rows = tile_from(i + 1) - from;
            const int64_t at = from * blocks.size() + number * rows;
            ColumnProduct product;
            product.packed = true;
            product.tokens = integers + from * stride + 8 * block.first_step * rows;
            product.panel = panel;
            product.start = starts + at;
            product.sum = sums + from * kColumns;
            product.scale = scales + block.group * kColumns;
            product.zero = zero == nullptr ? nullptr : zeros + block.group * kColumns;
            product.token_scale = scales_of_tokens + at;
            product.token_sum = sums_of_tokens + at;
            multiply_columns(product, static_cast<int>(rows), 2, block.steps);
          }
          ++number;
        }
        Token tile[kRows];
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t from = tile_from(i);
          const int rows = static_cast<int>(tile_from(i + 1) - from);
          results.place(first + from, rows, n, tile);
          finish_floats(finish, sums + from * kColumns, tile, rows);
        }
      }
    });
  }
  return true;
}

#ifdef __AVX512VNNI__
// Tokens of bfloat16 by weights of it. smooth(t, row, out) writes a token's, rounded to it;
// row is scratch.
template <class Smooth>
void bfloat16_in_tiles(const Smooth& smooth, const Weights& weights, const float* scale,
                       const int8_t* zero, int64_t groups, Results& results) {
  const int64_t in_features = weights.in_features, stride = 2 * round_up(in_features, 64);
  const int64_t panels = (weights.out_features + kColumns - 1) / kColumns;
  const int64_t tokens = static_cast<int64_t>(results.token.size());
  const int64_t chunks = (tokens + kMostTiled - 1) / kMostTiled;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = tokens * chunk / chunks;
    const int64_t count = tokens * (chunk + 1) / chunks - first;
    const int64_t tiles = (count + kTile - 1) / kTile;
    const auto tile_from = [&](int64_t i) { return first + count * i / tiles; };
    int8_t* tiled = scratch<int8_t>(kTokens, tiles * kTile * stride);
    at::parallel_for(0, tiles, 1 + 4096 / (in_features + 1), [&](int64_t begin, int64_t end) {
      float* row = scratch<float>(kRow, (1 + kTile / 2) * in_features);
      uint16_t* halves = reinterpret_cast<uint16_t*>(row + in_features);
      for (int64_t i = begin; i < end; ++i) {
        const uint16_t* pointers[kTile];
        const int rows = static_cast<int>(tile_from(i + 1) - tile_from(i));
        for (int r = 0; r < rows; ++r) {
          smooth(results.order[tile_from(i) + r], row, halves + r * in_features);
          pointers[r] = halves + r * in_features;
        }
        tile_tokens(pointers, rows, weights.packed, in_features, tiled + i * kTile * stride);
      }
    });
    const int64_t step = panels_of_task(panels, count, stride);
    const int64_t tasks = (panels + step - 1) / step;
    share(tasks, panels_of_thread(count * step, in_features), [&](int64_t begin, int64_t end) {
      const Tiles shapes;
      float* arrays = scratch<float>(kArrays, results.array_size());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t from = task * step, to = std::min(panels, from + step);
        const char* sums = static_cast<const char*>(sums_of_tiles(
            {tiled, kTile * stride, tiles}, to - from, in_features, 1, 32, nullptr,
            [&](int64_t p, int64_t k, int64_t width, int8_t* panel) {
              tile_weights_bfloat16(weights, (from + p) * kColumns, k, width, groups, scale,
                                    zero, panel);
            }));
        for (int64_t n = from * kColumns; n < to * kColumns; n += kColumns) {
          const Finish finish = results.finish(0, n, arrays);
          for (int64_t i = 0; i < tiles; ++i, sums += 4 * kTileBytes) {
            finish_sums(finish, sums, results, tile_from(i),
                        static_cast<int>(tile_from(i + 1) - tile_from(i)), n);
          }
        }
      }
    });
  }
}
#endif

Tensor weight_only_linear(const Tensor& x, const Tensor& act_pre_scale, const Tensor& qdata,
                          const Tensor& scale, const MaybeTensor& zero_point,
                          const MaybeTensor& l1, const MaybeTensor& l2,
                          const MaybeTensor& modality_bias, const MaybeTensor& modality_ids,
                          const MaybeTensor& bias, at::IntArrayRef ranks, int64_t weight_bits,
                          at::ScalarType out_dtype, const MaybeTensor& low_rank_scale,
                          int64_t hadamard_size) {
  check_processor();
  TORCH_CHECK(x.dim() == 2 && act_pre_scale.dim() == 2 &&
                  act_pre_scale.size(1) == x.size(1) && act_pre_scale.size(0) > 0,
              "masquant: smoothing factors of shape ", act_pre_scale.sizes(),
              " do not fit tokens of shape ", x.sizes(), ".");
  const int64_t tokens = x.size(0), in_features = x.size(1);
  check_rotation(hadamard_size, in_features);
  const Tensor rows_of_x = readable_rows(x), pre_scale = floats(act_pre_scale),
               channel_scale = floats(scale);
  const Matrices matrices(kLinear, qdata, in_features, weight_bits);
  const Weights& weights = matrices.first;
  const int64_t groups = checked_groups(channel_scale, matrices);
  const int64_t width = in_features / groups;
  Tensor zero, ids;
  if (zero_point) {
    TORCH_CHECK(zero_point->sizes() == scale.sizes() && zero_point->scalar_type() == at::kChar,
                "masquant: zero points are int8, one beside each scale, got ",
                zero_point->sizes(), " ", zero_point->scalar_type(), ".");
    zero = zero_point->contiguous();
  }
  if (modality_ids) ids = checked_ids(*modality_ids, tokens, pre_scale.size(0));
  const Type type = type_of(rows_of_x);
  const auto factors = [&](int64_t t) {
    const int64_t m = ids.defined() ? ids.const_data_ptr<int32_t>()[t] : 0;
    return pre_scale.const_data_ptr<float>() + m * in_features;
  };
  MaybeTensor hidden;
  if (l1 && modality_ids) {
    const Downs down(kLinear, *l1, in_features, *modality_ids, tokens, ranks, low_rank_scale);
    hidden = down.zeros(tokens);
    project_down(
        down[0], down.ids(), tokens, hadamard_size,
        [&](int64_t t, int64_t k, int64_t count, float* out) {
          smooth_row(row_of(rows_of_x, t) + k * rows_of_x.element_size(), type, factors(t) + k,
                     count, out);
          rotate_row(out, count, hadamard_size);
        },
        [](int64_t) { return 1.0f; }, hidden->mutable_data_ptr<float>());
  }
  Results results(one_expert(tokens), tokens, matrices, out_dtype, x, hidden, l2, modality_bias,
                  modality_ids, bias);
  if (tokens == 0 || weights.out_features == 0) return results.take();

  const auto smooth = [&](int64_t t, float* out) {
    smooth_row(row_of(rows_of_x, t), type, factors(t), in_features, out);
    rotate_row(out, in_features, hadamard_size);
  };
  const float* scales_of_all = channel_scale.const_data_ptr<float>();
  const int8_t* zeros_of_all = zero.defined() ? zero.const_data_ptr<int8_t>() : nullptr;
#ifdef __AVX512VNNI__
  // Rounded to bfloat16; row is scratch.
  const auto smooth_bfloat16 = [&](int64_t t, float* row, uint16_t* out) {
    if (hadamard_size > 1) {
      smooth(t, row);
      to_bfloat16_row(row, in_features, out);
    } else {
      smooth_row_bfloat16(row_of(rows_of_x, t), type, factors(t), in_features, out);
    }
  };
  if (type == Type::kBFloat16 &&
      multiplies_bfloat16_tiles(tokens, weights.packed, in_features, groups)) {
    bfloat16_in_tiles(smooth_bfloat16, weights, scales_of_all, zeros_of_all, groups, results);
    return results.take();
  }
#endif
  if (reads_stored_floats(tokens, weights.packed, width, type) &&
      few_floats(smooth, type == Type::kFloat32 ? 3 : 2, weights, scales_of_all, zeros_of_all,
                 groups, results)) {
    return results.take();
  }

  if (reads_columns(tokens, weights.packed, width, type) &&
      floats_in_columns(smooth, weights, scales_of_all, zeros_of_all, groups, results)) {
    return results.take();
  }

  const bool bfloat16 = multiplies_bfloat16(tokens, type);
  // As many tokens at once as leave room for the panel in the second-level cache.
  constexpr int64_t kMostDepth = 256;
  const int64_t depth_of_block = bfloat16 ? kMostDepth : kMostDepth / 2;
  const int64_t chunk = (bfloat16 ? 80 : 40) * kRows;
  const int64_t stride = round_up(in_features, 2);
  const int64_t panels = (weights.out_features + kColumns - 1) / kColumns;
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first);
    // Smoothed tokens, in the order of the results: floats, or halves of as many.
    float* smoothed = scratch<float>(kShared, count * stride);
    uint16_t* halves = reinterpret_cast<uint16_t*>(smoothed);
    at::parallel_for(0, count, 1 + 16384 / (in_features + 1), [&](int64_t begin, int64_t end) {
      float* row = bfloat16 ? scratch<float>(kRow, in_features) : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = results.order[first + i];
#ifdef __AVX512VNNI__
        if (bfloat16) {
          uint16_t* out = halves + i * stride;
          smooth_bfloat16(t, row, out);
          if (stride > in_features) out[in_features] = 0;
          continue;
        }
#endif
        smooth(t, smoothed + i * in_features);
      }
    });
    const int64_t grain = panels_of_thread(count, in_features);
    at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      float* arrays = scratch<float>(kArrays, results.array_size());
      float* products = scratch<float>(kProducts, count * kColumns);
      int8_t* panel = scratch<int8_t>(kPanel, kMostDepth * kColumns);
      float* floats_of_panel =
          scratch<float>(kFloats, (kMostDepth + 2 * groups) * kColumns);
      float* scales = floats_of_panel + kMostDepth * kColumns;
      float* zeros = scales + groups * kColumns;
      uint16_t* halves_of_panel = reinterpret_cast<uint16_t*>(floats_of_panel);
      const float* pointers[kRows];
      const uint16_t* half_pointers[kRows];
      Token tile[kRows];
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = p * kColumns;
        const Finish finish = results.finish(0, n, arrays);
        for (int64_t g = 0; g < groups; ++g) {
          for (int c = 0; c < kColumns; ++c) {
            const bool inside = c < finish.columns;
            const int64_t at = (n + c) * groups + g;
            scales[g * kColumns + c] = inside ? scales_of_all[at] : 0.0f;
            zeros[g * kColumns + c] =
                inside && zeros_of_all != nullptr ? zeros_of_all[at] : 0.0f;
          }
        }
        if (in_features == 0) std::memset(products, 0, count * kColumns * sizeof(float));
        for (int64_t k = 0; k < in_features; k += depth_of_block) {
          const int64_t depth = std::min(depth_of_block, in_features - k);
          pack_panel(weights, n, k, depth, panel);
          if constexpr (kAllKernels) {
            if (bfloat16) {
              expand_panel_bfloat16(panel, k, depth, width, scales, zeros, halves_of_panel);
              const int64_t even = round_up(depth, 2);
              for (int64_t i = 0; i < count; i += kRows) {
                const int rows = static_cast<int>(std::min<int64_t>(kRows, count - i));
                for (int r = 0; r < rows; ++r) half_pointers[r] = halves + (i + r) * stride + k;
                multiply_bfloat16_panel(half_pointers, rows, halves_of_panel, even, k > 0,
                                        products + i * kColumns);
              }
              continue;
            }
          }
          expand_panel(panel, k, depth, width, scales, zeros, floats_of_panel);
          for (int64_t i = 0; i < count; i += kRows) {
            const int rows = static_cast<int>(std::min<int64_t>(kRows, count - i));
            for (int r = 0; r < rows; ++r) pointers[r] = smoothed + (i + r) * in_features + k;
            multiply_float_panel(pointers, rows, floats_of_panel, depth, finish.columns, k > 0,
                                 products + i * kColumns);
          }
        }
        for (int64_t i = 0; i < count; i += kRows) {
          const int rows = static_cast<int>(std::min<int64_t>(kRows, count - i));
          results.place(first + i, rows, n, tile);
          finish_floats(finish, products + i * kColumns, tile, rows);
        }
      }
    });
  }
  return results.take();
}

template <class Library>
void implement(Library& library) {
  library.impl("smooth_quantize", TORCH_FN(smooth_quantize));
  library.impl("low_rank_down", TORCH_FN(low_rank_down));
  library.impl("int_linear", TORCH_FN(int_linear));
  library.impl("weight_only_linear", TORCH_FN(weight_only_linear));
  library.impl("expert_int_linear", TORCH_FN(expert_int_linear));
}

// Makes these the masquant:: operators' kernels for the CPU, once and for all.
void install() {
  static torch::Library* library = [] {
    auto* made = new torch::Library(torch::Library::IMPL, "masquant", c10::DispatchKey::CPU,
                                    __FILE__, __LINE__);
    implement(*made);
    return made;
  }();
  (void)library;
}

}  // namespace

TORCH_LIBRARY(masquant_cpu, m) {
  m.def("smooth_quantize(Tensor x, Tensor act_pre_scale, Tensor? modality_ids,"
        " int act_bits, Tensor? act_shift=None, int hadamard_size=1)"
        " -> (Tensor qdata, Tensor scale)");
  m.def("low_rank_down(Tensor qdata, Tensor scale, Tensor l1, Tensor modality_ids,"
        " int[] ranks, Tensor? low_rank_scale=None) -> Tensor");
  m.def("int_linear(Tensor qx, Tensor x_scale, Tensor qdata, Tensor scale,"
        " Tensor? low_rank_hidden, Tensor? l2, Tensor? modality_bias,"
        " Tensor? modality_ids, Tensor? bias, int weight_bits, ScalarType out_dtype)"
        " -> Tensor");
  m.def("weight_only_linear(Tensor x, Tensor act_pre_scale, Tensor qdata, Tensor scale,"
        " Tensor? zero_point, Tensor? l1, Tensor? l2, Tensor? modality_bias,"
        " Tensor? modality_ids, Tensor? bias, int[] ranks, int weight_bits,"
        " ScalarType out_dtype, Tensor? low_rank_scale=None, int hadamard_size=1)"
        " -> Tensor");
  m.def("expert_int_linear(Tensor qx, Tensor x_scale, Tensor ends, Tensor qdata,"
        " Tensor scale, Tensor? l1, Tensor? l2, Tensor? modality_bias,"
        " Tensor? modality_ids, Tensor? bias, int[] ranks, int weight_bits,"
        " ScalarType out_dtype, Tensor? low_rank_scale=None) -> Tensor");
  m.def("install() -> ()", &install);
  m.def("kernel_of(int weight_bits, int act_bits, int tokens, int in_features,"
        " int groups) -> str", &kernel_of);
  m.def("use_tiles(bool value) -> ()", [](bool value) { use_tiles = value && has_tiles(); });
  m.def("use_bfloat16(bool value) -> ()", [](bool value) { use_bfloat16 = value; });
}

TORCH_LIBRARY_IMPL(masquant_cpu, CPU, m) { implement(m); }

}  // namespace masquant
