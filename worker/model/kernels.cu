// The point-wise work between the matrix products, each in one pass over memory.
//
// Compiled when a process first needs it, for the width D of the model and the width H of a head
// (-DWIDTH, -DHEAD), and for the threads that work on a token's heads (-DHEAD_THREADS). Values are
// bfloat16 in memory and float32 in registers; each result is rounded once. A row is a token. One
// block of threads works on one row, eight values a thread.

typedef unsigned short bits16;
typedef unsigned int bits32;

constexpr int ACTIVE = WIDTH / 8;  // threads that hold values
constexpr int WARPS = (ACTIVE + 31) / 32;

struct Eight {
  float value[8];
};

__device__ __forceinline__ Eight unpack(uint4 packed) {
  Eight eight;
  const bits32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    eight.value[2 * i] = __uint_as_float(words[i] << 16);
    eight.value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return eight;
}

__device__ __forceinline__ bits32 pack_two(float low, float high) {
  bits32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint4 pack(const Eight& eight) {
  return make_uint4(pack_two(eight.value[0], eight.value[1]), pack_two(eight.value[2], eight.value[3]),
                    pack_two(eight.value[4], eight.value[5]), pack_two(eight.value[6], eight.value[7]));
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ __forceinline__ float sum_of_block(float value) {
  __shared__ float of_warps[32];
  value = sum_of_warp(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) value += of_warps[warp];
  return value;
}

__device__ __forceinline__ void norm_and_modulate(const Eight& x, bool active, const uint4* shift,
                                                  const uint4* scale, uint4* out, float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x.value[i];
  const float mean = sum_of_block(active ? sum : 0) / WIDTH;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += (x.value[i] - mean) * (x.value[i] - mean);
  const float inverse = rsqrtf(sum_of_block(active ? squares : 0) / WIDTH + eps);
  if (!active) return;
  const Eight by = unpack(scale[threadIdx.x]), plus = unpack(shift[threadIdx.x]);
  Eight y;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    y.value[i] = (x.value[i] - mean) * inverse * (1 + by.value[i]) + plus.value[i];
  *out = pack(y);
}

// Adaptive layer norm (adaLN): out = norm(x) * (1 + scale) + shift
extern "C" __global__ void adaln_modulate(const uint4* x, const uint4* shift, const uint4* scale,
                                          uint4* out, float eps) {
  const bool active = threadIdx.x < ACTIVE;
  const size_t at = (size_t)blockIdx.x * ACTIVE + threadIdx.x;
  const Eight row = unpack(active ? x[at] : make_uint4(0, 0, 0, 0));
  norm_and_modulate(row, active, shift, scale, out + at, eps);
}

// sum = x + gate * y; out = norm(sum) * (1 + scale) + shift
extern "C" __global__ void gated_residual_adaln(const uint4* x, const uint4* y, const uint4* gate,
                                              const uint4* shift, const uint4* scale, uint4* sum,
                                              uint4* out, float eps) {
  const bool active = threadIdx.x < ACTIVE;
  const size_t at = (size_t)blockIdx.x * ACTIVE + threadIdx.x;
  Eight row = unpack(make_uint4(0, 0, 0, 0));
  if (active) {
    row = unpack(x[at]);
    const Eight more = unpack(y[at]), by = unpack(gate[threadIdx.x]);
#pragma unroll
    for (int i = 0; i < 8; ++i) row.value[i] += by.value[i] * more.value[i];
    const uint4 rounded = pack(row);
    sum[at] = rounded;
    row = unpack(rounded);  // what the next block will read
  }
  norm_and_modulate(row, active, shift, scale, out + at, eps);
}

// sum = x + gate * (y + z); z may be null
extern "C" __global__ void gated_residual(const uint4* x, const uint4* y, const uint4* z,
                                     const uint4* gate, uint4* sum) {
  if (threadIdx.x >= ACTIVE) return;
  const size_t at = (size_t)blockIdx.x * ACTIVE + threadIdx.x;
  Eight row = unpack(x[at]), more = unpack(y[at]);
  const Eight by = unpack(gate[threadIdx.x]);
  if (z != nullptr) {
    const Eight also = unpack(z[at]);
#pragma unroll
    for (int i = 0; i < 8; ++i) more.value[i] += also.value[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) row.value[i] += by.value[i] * more.value[i];
  sum[at] = pack(row);
}

// RMS norm of each head, then its rotation by the token's position (RoPE); cosines null: no
// rotation. HEAD / 8 threads work on a head, eight values a thread, and on several heads in turn:
// these turn by the same angles. A token's heads may be some of a row of x: rows lie a stride apart.
extern "C" __global__ void norm_and_rotate(const uint4* x, long long stride, const uint4* weight,
                                           const float2* cosines, const float2* sines,
                                           uint4* out, long long heads, float eps) {
  constexpr int LANES = HEAD / 8, MOST_HEADS = WIDTH / HEAD;
  constexpr int AT_ONCE = HEAD_THREADS / LANES, ROUNDS = (MOST_HEADS + AT_ONCE - 1) / AT_ONCE;
  const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
  const size_t row = (size_t)blockIdx.x * stride, out_row = (size_t)blockIdx.x * heads * LANES;
  uint4 packed[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int head = first + round * AT_ONCE;
    packed[round] = head < heads ? x[row + head * LANES + lane] : make_uint4(0, 0, 0, 0);
  }
  const Eight by = unpack(weight[lane]);
  float2 c[4], s[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const size_t at = (size_t)blockIdx.x * (HEAD / 2) + 4 * lane + i;
    c[i] = cosines ? cosines[at] : make_float2(1, 1);
    s[i] = cosines ? sines[at] : make_float2(0, 0);
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    if (round * AT_ONCE >= heads) break;
    Eight eight = unpack(packed[round]);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += eight.value[i] * eight.value[i];
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(~0u, squares, offset);
    const float inverse = rsqrtf(squares / HEAD + eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float real = eight.value[2 * i] * inverse * by.value[2 * i];
      const float imaginary = eight.value[2 * i + 1] * inverse * by.value[2 * i + 1];
      eight.value[2 * i] = real * c[i].x - imaginary * s[i].x;
      eight.value[2 * i + 1] = imaginary * c[i].y + real * s[i].y;
    }
    const int head = first + round * AT_ONCE;
    if (head < heads) out[out_row + head * LANES + lane] = pack(eight);
  }
}

__device__ __forceinline__ float gelu(float x) {  // by tanh, which is a sigmoid of twice as much
  const float twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1 + __expf(-twice));
}

// x = gelu(x), eight values a thread
extern "C" __global__ void gelu_in_place(uint4* x, long long count) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  Eight eight = unpack(x[at]);
#pragma unroll
  for (int i = 0; i < 8; ++i) eight.value[i] = gelu(eight.value[i]);
  x[at] = pack(eight);
}

#if __CUDA_ARCH__ >= 890  // e4m3
__device__ __forceinline__ float largest_of_block(float value) {
  __shared__ float of_warps[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) value = fmaxf(value, of_warps[warp]);
  return value;
}

__device__ __forceinline__ bits32 pack_e4m3(float a, float b, float c, float d) {
  bits16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (bits32)high << 16 | low;
}

// A row of four times the width in 8 bits, or its GELU, and the scale that gives the values back.
// `stride` counts eights of the input.
template <bool GELU>
__device__ __forceinline__ void quantize(const uint4* x, long long stride, uint2* out,
                                         float* scale) {
  constexpr int TIMES = 4;
  constexpr float LARGEST = 448.f;
  const bool active = threadIdx.x < ACTIVE;
  Eight kept[TIMES];
  float largest = 1e-30f;  // a row of zeros has a scale, too
  if (active) {
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
      kept[i] = unpack(x[blockIdx.x * stride + threadIdx.x + i * ACTIVE]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (GELU) kept[i].value[j] = gelu(kept[i].value[j]);
        largest = fmaxf(largest, fabsf(kept[i].value[j]));
      }
    }
  }
  largest = largest_of_block(largest);
  if (threadIdx.x == 0) scale[blockIdx.x] = largest / LARGEST;
  if (!active) return;
  const float by = LARGEST / largest;
  uint2* row = out + (size_t)blockIdx.x * TIMES * ACTIVE + threadIdx.x;
#pragma unroll
  for (int i = 0; i < TIMES; ++i) {
    const float* v = kept[i].value;
    row[i * ACTIVE] = make_uint2(pack_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by),
                                 pack_e4m3(v[4] * by, v[5] * by, v[6] * by, v[7] * by));
  }
}

extern "C" __global__ void quantize_per_token(const uint4* x, long long stride, uint2* out,
                                          float* scale) {
  quantize<false>(x, stride, out, scale);
}

extern "C" __global__ void quantize_gelu_per_token(const uint4* x, long long stride, uint2* out,
                                                  float* scale) {
  quantize<true>(x, stride, out, scale);
}
#endif

// Chunks of the autoencoder: frames of rows of columns of channels, in float16. A thread works on
// eight channels, always the same ones; `eighths` of the channels divide the threads of a block.

__device__ __forceinline__ float half_to_float(bits32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((bits16)bits));
  return value;
}

__device__ __forceinline__ bits32 pack_two_halves(float low, float high) {
  bits32 packed;
  asm("{.reg .f16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(packed)
      : "f"(low), "f"(high));
  return packed;
}

__device__ __forceinline__ Eight unpack_halves(uint4 packed) {
  Eight eight;
  const bits32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    eight.value[2 * i] = half_to_float(words[i] & 0xffffu);
    eight.value[2 * i + 1] = half_to_float(words[i] >> 16);
  }
  return eight;
}

__device__ __forceinline__ uint4 pack_halves(const Eight& eight) {
  const float* v = eight.value;
  return make_uint4(pack_two_halves(v[0], v[1]), pack_two_halves(v[2], v[3]),
                    pack_two_halves(v[4], v[5]), pack_two_halves(v[6], v[7]));
}

__device__ __forceinline__ int clamp_to(int value, int most) {
  return value < 0 ? 0 : value > most ? most : value;
}

// A block writes one row of the target, which has a border of one pixel that repeats its edge: the
// chunk with each value written `time` x `down` x `across` times, or, if there is a shift,
// silu(shift + scale * chunk). Height and width are the chunk's.
extern "C" __global__ void padded_chunk(const uint4* chunk, const float* shift, const float* scale,
                                        uint4* target, long long eighths, long long height,
                                        long long width, long long time, long long down,
                                        long long across) {
  const int rows = (int)(height * down) + 2, columns = (int)(width * across) + 2;
  const int frame = blockIdx.x / rows, row = blockIdx.x % rows;
  const int from_row = clamp_to(row - 1, rows - 3) / (int)down;
  const uint4* from = chunk + ((frame / time) * height + from_row) * width * eighths;
  uint4* to = target + (long long)blockIdx.x * columns * eighths;
  const int eighth = threadIdx.x % (int)eighths;
  Eight plus, by;
  if (shift != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      plus.value[i] = shift[8 * eighth + i];
      by.value[i] = scale[8 * eighth + i];
    }
  }
  const int step = blockDim.x / (int)eighths;
  for (int column = threadIdx.x / (int)eighths; column < columns; column += step) {
    const int from_column = clamp_to(column - 1, columns - 3) / (int)across;
    uint4 packed = from[from_column * (int)eighths + eighth];
    if (shift != nullptr) {
      Eight value = unpack_halves(packed);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = plus.value[i] + by.value[i] * value.value[i];
        value.value[i] = x / (1 + __expf(-x));
      }
      packed = pack_halves(value);
    }
    to[column * (int)eighths + eighth] = packed;
  }
}

// A block sums each channel, and its squares, over `summed` pixels of one frame or what is left of
// it; `parts` such blocks make a frame.
extern "C" __global__ void channel_sums(const uint4* chunk, float* totals, float* squares,
                                        long long eighths, long long pixels, long long parts,
                                        long long summed) {
  __shared__ float of_threads[16][256];
  const long long frame = blockIdx.x / parts, part = blockIdx.x % parts;
  const int eighth = threadIdx.x % (int)eighths, step = blockDim.x / (int)eighths;
  const long long end = min((part + 1) * summed, pixels);
  float sum[8] = {}, square[8] = {};
  for (long long pixel = part * summed + threadIdx.x / (int)eighths; pixel < end; pixel += step) {
    const Eight value = unpack_halves(chunk[(frame * pixels + pixel) * eighths + eighth]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] += value.value[i];
      square[i] += value.value[i] * value.value[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    of_threads[i][threadIdx.x] = sum[i];
    of_threads[8 + i][threadIdx.x] = square[i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < 16 * (int)eighths; at += blockDim.x) {
    const int which = at / (int)eighths, from = at % (int)eighths;
    float total = 0;
    for (int thread = from; thread < (int)blockDim.x; thread += (int)eighths)
      total += of_threads[which][thread];
    float* out = which < 8 ? totals : squares;
    out[((long long)blockIdx.x * eighths + from) * 8 + which % 8] = total;
  }
}

// The smallest set of key blocks, for each block of queries of each head, whose estimated share of
// the attention reaches `mass`; those that must be in it are in it first. One warp a row of scores.
// Out: each block's place in the set (0 or 1), their number, and their indices in order.
constexpr int MOST_BLOCKS = 2048;
constexpr int ROWS_A_BLOCK = 4;
#define INFINITE __uint_as_float(0x7f800000u)

extern "C" __global__ void choose_blocks(const float* scores, const unsigned char* required,
                                         const unsigned char* dense, unsigned char* kept, int* counts,
                                         int* indices, long long rows, long long query_blocks,
                                         long long key_blocks, float mass) {
  __shared__ float shares[ROWS_A_BLOCK][MOST_BLOCKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = (int)key_blocks;
  const long long row = (long long)blockIdx.x * ROWS_A_BLOCK + warp;
  if (row >= rows) return;
  const long long query = row % query_blocks;
  const unsigned char* must = required + query * key_blocks;
  const bool all = dense[query];
  float* share = shares[warp];

  float largest = -INFINITE;
  for (int j = lane; j < width; j += 32) {
    share[j] = scores[row * key_blocks + j];
    largest = fmaxf(largest, share[j]);
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  float sum = 0, given = 0;
  for (int j = lane; j < width; j += 32) {
    share[j] = __expf(share[j] - largest);
    sum += share[j];
    if (must[j]) given += share[j];
  }
  const float wanted = mass * sum_of_warp(sum) - sum_of_warp(given);

  // The largest threshold whose blocks reach what is wanted, by the bits of the positive floats.
  bits32 low = 0, high = 0x3f800001u;  // a share is at most 1
  while (high - low > 1) {
    const bits32 middle = (low + high) / 2;
    const float threshold = __uint_as_float(middle);
    float reached = 0;
    for (int j = lane; j < width; j += 32)
      if (!must[j] && share[j] >= threshold) reached += share[j];
    if (sum_of_warp(reached) >= wanted) low = middle;
    else high = middle;
  }
  const float threshold = wanted > 0 ? __uint_as_float(low) : INFINITE;

  int found = 0;
  for (int start = 0; start < width; start += 32) {
    const int j = start + lane;
    const bool chosen = j < width && (all || must[j] || share[j] >= threshold);
    const bits32 votes = __ballot_sync(~0u, chosen);
    if (j < width) kept[row * key_blocks + j] = chosen;
    if (chosen) indices[row * key_blocks + found + __popc(votes & ((1u << lane) - 1))] = j;
    found += __popc(votes);
  }
  if (lane == 0) counts[row] = found;
}

// Two results of attention over different keys become that over all of them, in place of the first.
// `bias` is added to the second's logarithm of sums, which is -inf where it saw no key.
extern "C" __global__ void merge_attended(uint4* out, const uint4* other, const float* sums,
                                          const float* other_sums, float bias, long long tokens,
                                          long long heads) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= tokens * heads * (HEAD / 8)) return;
  const long long head = at / (HEAD / 8) % heads, token = at / (HEAD / 8) / heads;
  const float first = sums[head * tokens + token], second = other_sums[head * tokens + token] + bias;
  if (!(second > -INFINITE)) return;  // what it wrote there is no number
  const float share = 1 / (1 + __expf(first - second));
  Eight mine = unpack(out[at]);
  const Eight others = unpack(other[at]);
#pragma unroll
  for (int i = 0; i < 8; ++i) mine.value[i] += share * (others.value[i] - mine.value[i]);
  out[at] = pack(mine);
}
