// llama.cpp's Q8_0 and Q4_0 as roundings: what is left of numbers that went through them and back. For comparing
// errors; the product never uses them.
// Source of the rules: ggml-org/llama.cpp:ggml/src/ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q4_0_ref)
#pragma once

#include <cstdint>

namespace minitron::engine {

inline constexpr int64_t kPeerBlock = 32;  // numbers that share a scale

// `count`, a multiple of kPeerBlock, numbers of [data, data + count) in place.
// Q8_0: scale max|x| / 127, kept in fp16; numbers are divided by the scale before it is rounded, half away from zero.
void RoundThroughQ80(float* data, int64_t count);
// Q4_0: scale x / -8 for the x of the largest magnitude, so that x itself becomes -8; numbers in [-8, 7].
void RoundThroughQ40(float* data, int64_t count);
// To bf16, half to even.
void RoundThroughBf16(float* data, int64_t count);

}  // namespace minitron::engine
