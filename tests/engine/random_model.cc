#include "tests/engine/random_model.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "engine/base/check.h"

namespace minitron::engine {

NemotronConfig SmallConfig() {
  NemotronConfig config;
  config.vocab_size = 131;
  config.hidden_size = 40;
  config.num_layers = 2;
  config.num_attention_heads = 12;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.rotary_dim = 8;
  config.intermediate_size = 68;
  config.max_position_embeddings = 256;
  config.bos_token_id = 2;
  config.eos_token_ids = {3};
  return config;
}

float NextUniform(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  const auto bits = static_cast<uint32_t>(state >> 40);  // 24 bits
  return static_cast<float>(bits) * 0x1.0p-23f - 1.0f;
}

void StoreElement(float value, DType dtype, void* destination) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (dtype == DType::kF32) {
    std::memcpy(destination, &value, sizeof(value));
    return;
  }
  uint16_t narrow = 0;
  if (dtype == DType::kBf16) {
    narrow = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  } else if (value != 0.0f) {
    const float magnitude = std::abs(value);
    CHECK(magnitude >= 0x1.0p-14f && magnitude <= 65504.0f);
    const uint32_t exponent = ((bits >> 23) & 0xFF) - (127 - 15);
    narrow = static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3FF));  // truncated
  }
  std::memcpy(destination, &narrow, sizeof(narrow));
}

RandomModel::RandomModel(const NemotronConfig& config, DType dtype, uint64_t seed)
    : config_(config), dtype_(dtype), state_(seed) {
  const int64_t hidden = config.hidden_size;
  const int64_t queries = config.query_width();
  const int64_t keys = config.key_value_width();
  const auto scale = [](int64_t inputs) { return 2.0f / std::sqrt(static_cast<float>(inputs)); };
  weights_.matrix_dtype = dtype;
  weights_.embedding = Make(config.vocab_size, hidden, 1.5f);
  for (int i = 0; i < config.num_layers; ++i) {
    LayerWeights layer;
    layer.input_norm_weight = Make(1, hidden, 0.3f);
    layer.input_norm_bias = Make(1, hidden, 0.3f);
    layer.q_proj = Make(queries, hidden, scale(hidden));
    layer.k_proj = Make(keys, hidden, scale(hidden));
    layer.v_proj = Make(keys, hidden, scale(hidden));
    layer.o_proj = Make(hidden, queries, scale(queries));
    layer.post_norm_weight = Make(1, hidden, 0.3f);
    layer.post_norm_bias = Make(1, hidden, 0.3f);
    layer.up_proj = Make(config.intermediate_size, hidden, scale(hidden));
    layer.down_proj = Make(hidden, config.intermediate_size, scale(config.intermediate_size));
    weights_.layers.push_back(layer);
  }
  weights_.final_norm_weight = Make(1, hidden, 0.3f);
  weights_.final_norm_bias = Make(1, hidden, 0.3f);
  weights_.lm_head = Make(config.vocab_size, hidden, 2.0f * scale(hidden));
}

WeightView RandomModel::Make(int64_t rows, int64_t cols, float scale) {
  const int64_t element_bytes = DTypeBytes(dtype_);
  auto& bytes = storage_.emplace_back(std::make_unique<std::vector<uint8_t>>(rows * cols * element_bytes));
  for (int64_t i = 0; i < rows * cols; ++i) {
    float value = NextUniform(state_) * scale;
    if (dtype_ == DType::kF16 && std::abs(value) < 0x1.0p-14f) value = 0.0f;
    StoreElement(value, dtype_, bytes->data() + i * element_bytes);
  }
  weights_.num_parameters += rows * cols;
  weights_.num_bytes += rows * cols * element_bytes;
  return {.data = bytes->data(), .dtype = dtype_, .rows = rows, .cols = cols};
}

}  // namespace minitron::engine
