// Decode attention for rows of different lengths: the body of a CUDA kernel, which language.py hands to MLX's JIT.
// MLX writes the head: the inputs qkv, keys, values, lengths, freqs and scale, the output out, the strides of keys and
// values, and the template's T, D, HEADS, KV_HEADS, THREADS and UNROLL. language.py tells the shapes.
//
// A block is one row and one query head. Four lanes share a key: with 16-byte loads each group of four reads whole
// sectors, and its partial softmax (maximum, sum, weighted values) stays in registers until all groups are merged.
constexpr int VEC = 16 / sizeof(T), PIECES = D / (4 * VEC), EACH = PIECES * VEC, GROUPS = THREADS / 4;
constexpr int WARPS = THREADS / 32;
struct alignas(16) Vec { T x[VEC]; };
const int head = blockIdx.y, row = blockIdx.z, kv = head / (HEADS / KV_HEADS);
const int lane = threadIdx.x % 4, group = threadIdx.x / 4, length = lengths[row];
const T* mine = qkv + size_t(row) * (HEADS + 2 * KV_HEADS) * D;
T* my_keys = const_cast<T*>(keys) + row * keys_strides[0] + kv * keys_strides[1];
T* my_values = const_cast<T*>(values) + row * values_strides[0] + kv * values_strides[1];
const int64_t key_step = keys_strides[2], value_step = values_strides[2];
__shared__ float query[D], key[D], value[D], sums[WARPS][D], tops[WARPS], totals[WARPS];

for (int i = threadIdx.x; i < D; i += THREADS) {
  const int pair = i % (D / 2);
  const float angle = length / freqs[pair], c = cosf(angle), s = i < D / 2 ? -sinf(angle) : sinf(angle);
  const T* q = mine + head * D;
  const T* k = mine + (HEADS + kv) * D;
  const int other = (i + D / 2) % D;
  query[i] = (float(q[i]) * c + float(q[other]) * s) * (scale[0] * 1.44269504f);  // exp2 is cheaper than exp
  const T turned = T(float(k[i]) * c + float(k[other]) * s), v = mine[(HEADS + KV_HEADS + kv) * D + i];
  key[i] = float(turned);
  value[i] = float(v);
  if (head % (HEADS / KV_HEADS) == 0) {  // into the cache itself, which MLX only knows as an input
    my_keys[length * key_step + i] = turned;
    my_values[length * value_step + i] = v;
  }
}
__syncthreads();

float q[EACH], acc[EACH], top = -1e30f, total = 0;
for (int p = 0; p < PIECES; p++)
  for (int e = 0; e < VEC; e++) {
    q[p * VEC + e] = query[(p * 4 + lane) * VEC + e];
    acc[p * VEC + e] = 0;
  }
const unsigned quad = 0xFu << (threadIdx.x % 32 & ~3);
for (int first = group; first < length; first += GROUPS * UNROLL) {
  Vec k[UNROLL][PIECES], v[UNROLL][PIECES];
  float score[UNROLL], best = top;
  for (int u = 0; u < UNROLL; u++) {
    const int n = min(first + u * GROUPS, length - 1);
    const Vec* kp = reinterpret_cast<const Vec*>(my_keys + n * key_step);
    const Vec* vp = reinterpret_cast<const Vec*>(my_values + n * value_step);
    for (int p = 0; p < PIECES; p++) {
      k[u][p] = kp[p * 4 + lane];
      v[u][p] = vp[p * 4 + lane];
    }
  }
  for (int u = 0; u < UNROLL; u++) {
    float dot = 0;
    for (int p = 0; p < PIECES; p++)
      for (int e = 0; e < VEC; e++) dot += q[p * VEC + e] * float(k[u][p].x[e]);
    dot += __shfl_xor_sync(quad, dot, 1);
    dot += __shfl_xor_sync(quad, dot, 2);
    score[u] = first + u * GROUPS < length ? dot : -1e30f;
    best = max(best, score[u]);
  }
  const float shrink = exp2f(top - best);
  total *= shrink;
  for (int i = 0; i < EACH; i++) acc[i] *= shrink;
  for (int u = 0; u < UNROLL; u++) {
    const float weight = first + u * GROUPS < length ? exp2f(score[u] - best) : 0;
    total += weight;
    for (int p = 0; p < PIECES; p++)
      for (int e = 0; e < VEC; e++) acc[p * VEC + e] += weight * float(v[u][p].x[e]);
  }
  top = best;
}
for (int step = 4; step < 32; step *= 2) {
  const float other = __shfl_xor_sync(0xFFFFFFFFu, top, step), best = max(top, other);
  const float shrink = exp2f(top - best), grow = exp2f(other - best);
  total = total * shrink + __shfl_xor_sync(0xFFFFFFFFu, total, step) * grow;
  for (int i = 0; i < EACH; i++) acc[i] = acc[i] * shrink + __shfl_xor_sync(0xFFFFFFFFu, acc[i], step) * grow;
  top = best;
}
const int warp = threadIdx.x / 32;
if (threadIdx.x % 32 < 4) {
  for (int p = 0; p < PIECES; p++)
    for (int e = 0; e < VEC; e++) sums[warp][(p * 4 + lane) * VEC + e] = acc[p * VEC + e];
  tops[warp] = top;
  totals[warp] = total;
}
float own = 0;  // the score of the new key, which every thread works out for itself
for (int i = threadIdx.x % 32; i < D; i += 32) own += query[i] * key[i];
for (int step = 1; step < 32; step *= 2) own += __shfl_xor_sync(0xFFFFFFFFu, own, step);
__syncthreads();
float best = own, all = 0;
for (int w = 0; w < WARPS; w++) best = max(best, tops[w]);
for (int w = 0; w < WARPS; w++) all += totals[w] * exp2f(tops[w] - best);
all += exp2f(own - best);
for (int i = threadIdx.x; i < D; i += THREADS) {
  float sum = value[i] * exp2f(own - best);
  for (int w = 0; w < WARPS; w++) sum += sums[w][i] * exp2f(tops[w] - best);
  out[(size_t(row) * HEADS + head) * D + i] = T(sum / all);
}
