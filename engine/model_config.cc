#include "engine/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "engine/checkpoint/mapped_file.h"

namespace minitron::engine {
namespace {

using Type = JsonValue::Type;

constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr char kConfigFile[] = "config.json";
constexpr char kGenerationConfigFile[] = "generation_config.json";
constexpr size_t kMaxEosTokens = 64;
// The ranges are a few times the largest known relative (Nemotron-4-340B: 96 layers, hidden 18432, 96 heads,
// intermediate 73728), so that a corrupt file is named instead of allocated for.
constexpr int64_t kMaxVocab = 4'000'000, kMaxHidden = 131'072, kMaxIntermediate = 1'048'576, kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 1024, kMaxHeadDim = 1024, kMaxPositions = 16'777'216;

// A value and the spelling it came under. `value` is null when no spelling is in the file.
struct Found {
  std::string key;
  const JsonValue* value = nullptr;
};

absl::Status Refuse(const std::string& key, const JsonValue& value, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat(key, " ", value.Describe(), ": ", why));
}

bool SameScalar(const JsonValue& a, const JsonValue& b) {
  const bool numeric = (a.is(Type::kInt) || a.is(Type::kNumber)) && (b.is(Type::kInt) || b.is(Type::kNumber));
  return numeric ? a.number == b.number : a.is(b.type) && a.Describe() == b.Describe();
}

// The value under any of `keys` of `root` or, if given, `nested` of rope_parameters; null values count as absent.
absl::StatusOr<Found> FindAny(const JsonValue& root, const std::vector<std::string>& keys,
                              const std::string& nested = "") {
  std::vector<Found> found;
  found.reserve(keys.size() + 1);
  for (const std::string& key : keys) found.push_back({key, root.Find(key)});
  const JsonValue* rope = root.Find("rope_parameters");
  if (!nested.empty() && rope != nullptr) found.push_back({"rope_parameters." + nested, rope->Find(nested)});
  Found first;
  for (const Found& candidate : found) {
    if (candidate.value == nullptr || candidate.value->is(Type::kNull)) continue;
    if (first.value == nullptr) {
      first = candidate;
    } else if (!SameScalar(*first.value, *candidate.value)) {
      return absl::InvalidArgumentError(absl::StrCat(first.key, " ", first.value->Describe(), " contradicts ",
                                                     candidate.key, " ", candidate.value->Describe()));
    }
  }
  return first;
}

absl::StatusOr<int> CheckedInt(const Found& found, int64_t min, int64_t max) {
  const std::string range = absl::StrCat("not an integer in [", min, ", ", max, "]");
  if (!found.value->is(Type::kInt) || found.value->integer < min || found.value->integer > max) {
    return Refuse(found.key, *found.value, range);
  }
  return static_cast<int>(found.value->integer);
}

// An integer with a class default; a null is no integer.
absl::StatusOr<int> ReadInt(const JsonValue& root, const std::string& key, int fallback, int64_t min, int64_t max) {
  const JsonValue* value = root.Find(key);
  if (value == nullptr) return fallback;
  return CheckedInt({key, value}, min, max);
}

// A number in [min, max] under any of the spellings.
absl::StatusOr<double> ReadNumber(const JsonValue& root, const std::vector<std::string>& keys,
                                  const std::string& nested, double fallback, double min, double max) {
  ASSIGN_OR_RETURN(const Found found, FindAny(root, keys, nested));
  if (found.value == nullptr) return fallback;
  const JsonValue& value = *found.value;
  const bool numeric = value.is(Type::kInt) || value.is(Type::kNumber);
  if (!numeric || !(value.number >= min && value.number <= max)) {
    return Refuse(found.key, value, absl::StrCat("not a number in [", min, ", ", max, "]"));
  }
  return value.number;
}

absl::Status RequireFalse(const JsonValue& root, const std::string& key) {
  const JsonValue* value = root.Find(key);
  if (value == nullptr || value->is(Type::kNull) || (value->is(Type::kBool) && !value->boolean)) {
    return absl::OkStatus();
  }
  return Refuse(key, *value, "only false is supported");
}

absl::Status CheckArchitecture(const JsonValue& root) {
  const JsonValue* model_type = root.Find("model_type");
  const JsonValue* architectures = root.Find("architectures");
  if (model_type == nullptr && architectures == nullptr) {
    return absl::InvalidArgumentError("model_type missing: expected \"nemotron\"");
  }
  if (model_type != nullptr && !(model_type->is(Type::kString) && model_type->string == "nemotron")) {
    return Refuse("model_type", *model_type, "only \"nemotron\" is supported");
  }
  if (architectures != nullptr && !architectures->is(Type::kNull)) {
    const bool known = architectures->is(Type::kArray) && architectures->items.size() == 1 &&
                       architectures->items[0].is(Type::kString) &&
                       architectures->items[0].string == "NemotronForCausalLM";
    if (!known) return Refuse("architectures", *architectures, "only [\"NemotronForCausalLM\"] is supported");
  }
  return absl::OkStatus();
}

// The type of a rope_scaling or rope_parameters dict must be "default": the reference implementation ignores any
// other, so a file that asks for one would silently run without it.
absl::Status CheckRopeType(const JsonValue& root, const std::string& key, bool type_required) {
  const JsonValue* rope = root.Find(key);
  if (rope == nullptr || rope->is(Type::kNull)) return absl::OkStatus();
  if (!rope->is(Type::kObject)) return Refuse(key, *rope, "not an object or null");
  bool has_type = false;
  for (const std::string type_key : {"rope_type", "type"}) {
    const JsonValue* type = rope->Find(type_key);
    if (type == nullptr) continue;
    has_type = true;
    if (!type->is(Type::kString) || type->string != "default") {
      return Refuse(absl::StrCat(key, ".", type_key), *type, "only \"default\" is supported");
    }
  }
  if (type_required && !has_type) return Refuse(key, *rope, "scaled rope is not supported");
  return absl::OkStatus();
}

// What is quantized, the tensors say; here only whether it is done in a way we read: E4M3 with a scale for each matrix
// or output. Scales of activations and of the KV cache are not needed.
absl::Status CheckQuantization(const JsonValue& root) {
  const JsonValue* quantization = root.Find("quantization_config");
  if (quantization == nullptr || quantization->is(Type::kNull)) return absl::OkStatus();
  const JsonValue* method = quantization->Find("quant_method");
  const JsonValue* format = quantization->Find("format");
  const JsonValue* blocks = quantization->Find("weight_block_size");
  const auto is = [](const JsonValue* value, const char* text) {
    return value != nullptr && value->is(Type::kString) && value->string == text;
  };
  if (!is(method, "fp8") && !(is(method, "compressed-tensors") && is(format, "float-quantized"))) {
    return Refuse("quantization_config", *quantization,
                  "supported: quant_method \"fp8\", or \"compressed-tensors\" with format \"float-quantized\"");
  }
  if (blocks != nullptr && !blocks->is(Type::kNull)) {
    return Refuse("quantization_config.weight_block_size", *blocks, "scales of blocks are not supported");
  }
  return absl::OkStatus();
}

absl::Status CheckVariant(const JsonValue& root) {
  RETURN_IF_ERROR(CheckArchitecture(root));
  ASSIGN_OR_RETURN(const Found act, FindAny(root, {"hidden_act"}));
  if (act.value != nullptr && !(act.value->is(Type::kString) && act.value->string == "relu2")) {
    return Refuse(act.key, *act.value, "only \"relu2\" is supported");
  }
  for (const char* key : {"attention_bias", "mlp_bias", "tie_word_embeddings"}) {
    RETURN_IF_ERROR(RequireFalse(root, key));
  }
  RETURN_IF_ERROR(CheckRopeType(root, "rope_scaling", true));
  RETURN_IF_ERROR(CheckRopeType(root, "rope_parameters", false));
  RETURN_IF_ERROR(CheckQuantization(root));
  ASSIGN_OR_RETURN(const Found dtype, FindAny(root, {"torch_dtype", "dtype"}));
  if (dtype.value != nullptr) {
    const std::string& name = dtype.value->string;
    const bool known = dtype.value->is(Type::kString) && (name == "bfloat16" || name == "float16" || name == "float32");
    if (!known) return Refuse(dtype.key, *dtype.value, "supported: bfloat16, float16, float32");
  }
  return absl::OkStatus();
}

absl::Status ReadSizes(const JsonValue& root, NemotronConfig& config) {
  ASSIGN_OR_RETURN(config.vocab_size, ReadInt(root, "vocab_size", 256000, 1, kMaxVocab));
  ASSIGN_OR_RETURN(config.hidden_size, ReadInt(root, "hidden_size", 6144, 1, kMaxHidden));
  ASSIGN_OR_RETURN(config.intermediate_size, ReadInt(root, "intermediate_size", 24576, 1, kMaxIntermediate));
  ASSIGN_OR_RETURN(config.num_layers, ReadInt(root, "num_hidden_layers", 32, 1, kMaxLayers));
  ASSIGN_OR_RETURN(config.max_position_embeddings, ReadInt(root, "max_position_embeddings", 4096, 1, kMaxPositions));
  return absl::OkStatus();
}

absl::Status ReadHeads(const JsonValue& root, NemotronConfig& config) {
  ASSIGN_OR_RETURN(config.num_attention_heads, ReadInt(root, "num_attention_heads", 48, 1, kMaxHeads));
  ASSIGN_OR_RETURN(const Found kv_heads, FindAny(root, {"num_key_value_heads"}));
  config.num_key_value_heads = config.num_attention_heads;
  if (kv_heads.value != nullptr) {
    ASSIGN_OR_RETURN(config.num_key_value_heads, CheckedInt(kv_heads, 1, kMaxHeads));
    if (config.num_attention_heads % config.num_key_value_heads != 0) {
      return Refuse(kv_heads.key, *kv_heads.value,
                    absl::StrCat("does not divide num_attention_heads ", config.num_attention_heads));
    }
  }
  ASSIGN_OR_RETURN(const Found head_dim, FindAny(root, {"head_dim", "kv_channels"}));
  if (head_dim.value != nullptr) {
    ASSIGN_OR_RETURN(config.head_dim, CheckedInt(head_dim, 8, kMaxHeadDim));
  } else if (config.hidden_size % config.num_attention_heads == 0) {
    config.head_dim = config.hidden_size / config.num_attention_heads;
  } else {
    return absl::InvalidArgumentError(absl::StrCat("head_dim missing: hidden_size ", config.hidden_size,
                                                   " is not a multiple of num_attention_heads ",
                                                   config.num_attention_heads));
  }
  if (config.head_dim % 8 != 0 || config.head_dim < 8 || config.head_dim > kMaxHeadDim) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim ", config.head_dim, ": not a multiple of 8 in [8, ", kMaxHeadDim, "]"));
  }
  return absl::OkStatus();
}

absl::Status ReadConstants(const JsonValue& root, NemotronConfig& config) {
  ASSIGN_OR_RETURN(const double factor,
                   ReadNumber(root, {"partial_rotary_factor", "rope_percent", "rope_percentage", "rotary_percent"},
                              "partial_rotary_factor", 0.5, 0.0, 1.0));
  const double rotary_dim = config.head_dim * factor;
  const double rounded = std::round(rotary_dim);
  // The reference would truncate; a fraction of a dim means the file is wrong. 1e-3: factors come with few digits.
  if (std::abs(rotary_dim - rounded) > 1e-3 || rounded < 2 || static_cast<int>(rounded) % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("partial_rotary_factor ", factor, ": rotates ", rotary_dim,
                                                   " of head_dim ", config.head_dim,
                                                   " dims, not an even number of at least 2"));
  }
  config.rotary_dim = static_cast<int>(rounded);
  ASSIGN_OR_RETURN(
      const double eps,
      ReadNumber(root, {"norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"}, "", 1e-5, 1e-12, 0.1));
  config.norm_eps = static_cast<float>(eps);
  ASSIGN_OR_RETURN(const double theta, ReadNumber(root, {"rope_theta"}, "rope_theta", 10000.0, 1.0, 1e12));
  config.rope_theta = static_cast<float>(theta);
  return absl::OkStatus();
}

// eos_token_id is one id or a list of them. Duplicates are dropped.
absl::StatusOr<std::vector<TokenId>> ParseEos(const JsonValue& value, int vocab_size) {
  const std::string key = "eos_token_id";
  std::vector<TokenId> ids;
  if (!value.is(Type::kArray)) {
    ASSIGN_OR_RETURN(const int id, CheckedInt({key, &value}, 0, vocab_size - 1));
    ids.push_back(id);
    return ids;
  }
  if (value.items.empty() || value.items.size() > kMaxEosTokens) {
    return Refuse(key, value, absl::StrCat("needs 1 to ", kMaxEosTokens, " ids"));
  }
  for (const JsonValue& item : value.items) {
    ASSIGN_OR_RETURN(const int id, CheckedInt({key, &item}, 0, vocab_size - 1));
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

// Overwrites the ids the file names; null and absent leave them.
absl::Status ReadTokenIds(const JsonValue& root, NemotronConfig& config) {
  ASSIGN_OR_RETURN(const Found bos, FindAny(root, {"bos_token_id"}));
  if (bos.value != nullptr) {
    ASSIGN_OR_RETURN(config.bos_token_id, CheckedInt(bos, 0, config.vocab_size - 1));
  }
  const JsonValue* eos = root.Find("eos_token_id");
  if (eos != nullptr && !eos->is(Type::kNull)) {
    ASSIGN_OR_RETURN(config.eos_token_ids, ParseEos(*eos, config.vocab_size));
  }
  return absl::OkStatus();
}

absl::StatusOr<JsonValue> ParseObject(const std::string& text) {
  JsonValue root;
  std::string error;
  if (!ParseJson(text.data(), static_cast<int64_t>(text.size()), {.max_bytes = kMaxConfigBytes}, &root, &error)) {
    return absl::InvalidArgumentError(error);
  }
  if (!root.is(Type::kObject)) return absl::InvalidArgumentError("not a JSON object");
  return root;
}

absl::Status InFile(const absl::Status& status, const std::string& file) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(file, ": ", std::string(status.message())));
}

// generation_config.json of the folder; nullopt when there is none.
absl::StatusOr<std::optional<JsonValue>> ReadGenerationConfig(const ModelDir& dir) {
  absl::StatusOr<std::string> text = dir.ReadText(kGenerationConfigFile, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return std::optional<JsonValue>();
  if (!text.ok()) return text.status();
  absl::StatusOr<JsonValue> root = ParseObject(*text);
  if (!root.ok()) return InFile(root.status(), kGenerationConfigFile);
  return std::optional<JsonValue>(std::move(root).value());
}

absl::StatusOr<GenerationDefaults> ParseGenerationDefaults(const JsonValue& root) {
  GenerationDefaults defaults;
  constexpr double kAbsent = -1.0;
  ASSIGN_OR_RETURN(const double temperature, ReadNumber(root, {"temperature"}, "", kAbsent, 0.0, 2.0));
  ASSIGN_OR_RETURN(const double top_p, ReadNumber(root, {"top_p"}, "", kAbsent, 1e-6, 1.0));
  ASSIGN_OR_RETURN(const Found top_k, FindAny(root, {"top_k"}));
  if (top_k.value != nullptr) {
    ASSIGN_OR_RETURN(defaults.top_k, CheckedInt(top_k, 0, kMaxVocab));
    defaults.has_top_k = true;
  }
  if (temperature != kAbsent) {
    defaults.has_temperature = true;
    defaults.temperature = static_cast<float>(temperature);
  }
  if (top_p != kAbsent) {
    defaults.has_top_p = true;
    defaults.top_p = static_cast<float>(top_p);
  }
  ASSIGN_OR_RETURN(const Found do_sample, FindAny(root, {"do_sample"}));
  if (do_sample.value != nullptr) {
    if (!do_sample.value->is(Type::kBool)) return Refuse(do_sample.key, *do_sample.value, "not true or false");
    if (!do_sample.value->boolean) {
      defaults.has_temperature = true;
      defaults.temperature = 0.0f;
    }
  }
  return defaults;
}

}  // namespace

absl::StatusOr<NemotronConfig> ParseNemotronConfig(const std::string& json_text) {
  ASSIGN_OR_RETURN(const JsonValue root, ParseObject(json_text));
  RETURN_IF_ERROR(CheckVariant(root));
  NemotronConfig config;
  RETURN_IF_ERROR(ReadSizes(root, config));
  RETURN_IF_ERROR(ReadHeads(root, config));
  RETURN_IF_ERROR(ReadConstants(root, config));
  config.bos_token_id = 2;
  config.eos_token_ids = {3};
  RETURN_IF_ERROR(ReadTokenIds(root, config));
  // The class defaults 2 and 3 may lie outside a tiny vocabulary.
  for (const TokenId id : {config.bos_token_id, config.eos_token_ids[0]}) {
    if (id >= config.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("vocab_size ", config.vocab_size, ": default token id ", id, " is outside it"));
    }
  }
  return config;
}

absl::StatusOr<NemotronConfig> LoadNemotronConfig(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(model_dir));
  ASSIGN_OR_RETURN(const std::string text, dir.ReadText(kConfigFile, kMaxConfigBytes));
  absl::StatusOr<NemotronConfig> config = ParseNemotronConfig(text);
  if (!config.ok()) return InFile(config.status(), kConfigFile);
  ASSIGN_OR_RETURN(const std::optional<JsonValue> generation, ReadGenerationConfig(dir));
  if (generation.has_value()) RETURN_IF_ERROR(InFile(ReadTokenIds(*generation, *config), kGenerationConfigFile));
  return config;
}

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(model_dir));
  ASSIGN_OR_RETURN(const std::optional<JsonValue> generation, ReadGenerationConfig(dir));
  if (!generation.has_value()) return GenerationDefaults();
  absl::StatusOr<GenerationDefaults> defaults = ParseGenerationDefaults(*generation);
  if (!defaults.ok()) return InFile(defaults.status(), kGenerationConfigFile);
  return defaults;
}

}  // namespace minitron::engine
