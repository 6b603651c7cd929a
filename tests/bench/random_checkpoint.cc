#include "tests/bench/random_checkpoint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <fstream>

namespace minitron::bench {
namespace {

engine::NemotronConfig Shape(int layers, int hidden, int heads, int kv_heads, int intermediate, int vocab) {
  engine::NemotronConfig config;
  config.num_layers = layers;
  config.hidden_size = hidden;
  config.num_attention_heads = heads;
  config.num_key_value_heads = kv_heads;
  config.head_dim = 128;
  config.rotary_dim = 64;
  config.intermediate_size = intermediate;
  config.vocab_size = vocab;
  config.max_position_embeddings = 4096;
  return config;
}

std::string ConfigJson(const engine::NemotronConfig& c) {
  char text[1024];
  std::snprintf(
      text, sizeof(text),
      "{\"architectures\": [\"NemotronForCausalLM\"], \"model_type\": \"nemotron\", \"hidden_act\": \"relu2\",\n"
      " \"vocab_size\": %d, \"hidden_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d,\n"
      " \"num_key_value_heads\": %d, \"head_dim\": %d, \"intermediate_size\": %d,\n"
      " \"max_position_embeddings\": %d, \"norm_eps\": 1e-05, \"partial_rotary_factor\": 0.5,\n"
      " \"rope_theta\": 10000.0, \"bos_token_id\": 2, \"eos_token_id\": 3, \"tie_word_embeddings\": false,\n"
      " \"torch_dtype\": \"bfloat16\"}\n",
      c.vocab_size, c.hidden_size, c.num_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
      c.intermediate_size, c.max_position_embeddings);
  return text;
}

int64_t NumElements(const TensorSpec& tensor) {
  int64_t count = 1;
  for (const int64_t extent : tensor.shape) count *= extent;
  return count;
}

std::string Header(const std::vector<TensorSpec>& tensors) {
  std::string header = "{";
  int64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    const int64_t end = offset + 2 * NumElements(tensor);
    header += header.size() == 1 ? "\"" : ",\"";
    header += tensor.name + "\":{\"dtype\":\"BF16\",\"shape\":[" + std::to_string(tensor.shape[0]);
    if (tensor.shape.size() == 2) header += "," + std::to_string(tensor.shape[1]);
    header += "],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(end) + "]}";
    offset = end;
  }
  header += "}";
  header.resize((header.size() + 63) / 64 * 64 + 56, ' ');  // data on a cache line, after the 8 bytes of length
  return header;
}

}  // namespace

bool ShapeByName(const std::string& name, engine::NemotronConfig& config) {
  if (name == "1b") {
    config = Shape(16, 2048, 24, 8, 8192, 32000);
  } else if (name == "1b-square") {
    config = Shape(16, 2048, 16, 8, 8192, 32000);
  } else if (name == "8b") {
    config = Shape(32, 4096, 48, 8, 16384, 256000);
  } else if (name == "8b-4-layers") {
    config = Shape(4, 4096, 48, 8, 16384, 32000);
  } else {
    return false;
  }
  return true;
}

std::vector<TensorSpec> TensorSpecs(const engine::NemotronConfig& c) {
  std::vector<TensorSpec> tensors;
  const auto matrix = [&](const std::string& name, int64_t outs, int64_t ins) {
    tensors.push_back({name, {outs, ins}, std::sqrt(3.0f / static_cast<float>(ins))});
  };
  const auto norm = [&](const std::string& name) {
    tensors.push_back({name + ".weight", {c.hidden_size}, 0.1f});
    tensors.push_back({name + ".bias", {c.hidden_size}, 0.05f});
  };
  tensors.push_back({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, 1.0f});
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    norm(prefix + "input_layernorm");
    matrix(prefix + "self_attn.q_proj.weight", c.query_width(), c.hidden_size);
    matrix(prefix + "self_attn.k_proj.weight", c.key_value_width(), c.hidden_size);
    matrix(prefix + "self_attn.v_proj.weight", c.key_value_width(), c.hidden_size);
    matrix(prefix + "self_attn.o_proj.weight", c.hidden_size, c.query_width());
    norm(prefix + "post_attention_layernorm");
    matrix(prefix + "mlp.up_proj.weight", c.intermediate_size, c.hidden_size);
    matrix(prefix + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size);
  }
  norm("model.norm");
  matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  return tensors;
}

void RandomBf16(uint64_t seed, int64_t first, int64_t count, float scale, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    // splitmix64 of the index: no state, so any part can be made on its own.
    uint64_t z = seed + static_cast<uint64_t>(first + i) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    const auto grid = static_cast<int32_t>(z >> 48) - 32768;
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(grid) * 0x1.0p-15f * scale);
    out[i] = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}

bool WriteRandomCheckpoint(const std::string& dir, const engine::NemotronConfig& config, uint64_t seed) {
  std::ofstream(dir + "/config.json") << ConfigJson(config);
  std::ofstream file(dir + "/model.safetensors", std::ios::binary);
  const std::vector<TensorSpec> tensors = TensorSpecs(config);
  const std::string header = Header(tensors);
  const uint64_t length = header.size();
  file.write(reinterpret_cast<const char*>(&length), sizeof(length));  // little-endian hosts only
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  std::vector<uint16_t> chunk(4 << 20);
  for (const TensorSpec& tensor : tensors) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const int64_t total = NumElements(tensor);
    for (int64_t first = 0; first < total; first += static_cast<int64_t>(chunk.size())) {
      const int64_t count = std::min<int64_t>(static_cast<int64_t>(chunk.size()), total - first);
      RandomBf16(seed, first, count, tensor.scale, chunk.data());
      file.write(reinterpret_cast<const char*>(chunk.data()), 2 * count);
    }
  }
  file.close();
  if (!file) std::fprintf(stderr, "cannot write %s/model.safetensors\n", dir.c_str());
  return static_cast<bool>(file);
}

}  // namespace minitron::bench
