// NemotronConfig: the shape and constants of a Nemotron model, from config.json (and generation_config.json).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/sampling_params.h"

namespace minitron::engine {

struct NemotronConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int num_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;    // not hidden_size / num_attention_heads in the 8B
  int rotary_dim = 0;  // leading dims of each head that are rotated: head_dim * partial_rotary_factor
  int intermediate_size = 0;
  int max_position_embeddings = 0;
  float norm_eps = 1e-5f;
  float rope_theta = 10000.0f;
  TokenId bos_token_id = 0;
  std::vector<TokenId> eos_token_ids;

  int query_width() const { return num_attention_heads * head_dim; }
  int key_value_width() const { return num_key_value_heads * head_dim; }
  int group_size() const { return num_attention_heads / num_key_value_heads; }
};

// Sampling defaults a checkpoint recommends (generation_config.json); unset when it says nothing.
struct GenerationDefaults {
  bool has_temperature = false, has_top_k = false, has_top_p = false;
  float temperature = 1.0f;
  int top_k = 0;
  float top_p = 1.0f;
};

// Parses the text of config.json. Every known spelling is accepted (kv_channels, rope_percent, rope_parameters, ...);
// spellings that contradict each other, unknown activations, scaled rope, biases, tied heads and values out of range
// are refused. Error: INVALID_ARGUMENT naming key and value.
absl::StatusOr<NemotronConfig> ParseNemotronConfig(const std::string& json_text);

// Reads `model_dir`/config.json, then eos and bos ids from generation_config.json when there is one.
// Errors: NOT_FOUND, INVALID_ARGUMENT (file, key, value).
absl::StatusOr<NemotronConfig> LoadNemotronConfig(const std::string& model_dir);

// Reads `model_dir`/generation_config.json; defaults when there is none. do_sample=false means temperature 0.
// Error: INVALID_ARGUMENT (key, value).
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& model_dir);

}  // namespace minitron::engine
