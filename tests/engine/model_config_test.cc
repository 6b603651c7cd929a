// model_config: the config.json of every real model of the family, every spelling, and every refusal by key and value.
#include "engine/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/engine/model_files.h"

namespace minitron::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kMinitron8B[] = R"({
  "architectures": ["NemotronForCausalLM"], "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "relu2",
  "hidden_size": 4096, "initializer_range": 0.0134, "intermediate_size": 16384, "max_position_embeddings": 4096,
  "model_type": "nemotron", "num_attention_heads": 48, "head_dim": 128, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "norm_eps": 1e-05, "rope_theta": 10000, "partial_rotary_factor": 0.5,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": true,
  "vocab_size": 256000})";

// The first upload of the same repository spelled two keys differently.
constexpr char kMinitron8BFirst[] = R"({
  "architectures": ["NemotronForCausalLM"], "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "relu2",
  "hidden_size": 4096, "initializer_range": 0.0134, "intermediate_size": 16384, "max_position_embeddings": 4096,
  "model_type": "nemotron", "num_attention_heads": 48, "kv_channels": 128, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "norm_eps": 1e-05, "rope_percent": 0.5, "rope_scaling": null, "rope_theta": 10000,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 256000})";

// As transformers 5 saves it again: rope settings in a dict, "dtype".
constexpr char kMinitron8BResaved[] = R"({
  "architectures": ["NemotronForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 2,
  "dtype": "bfloat16", "eos_token_id": 3, "head_dim": 128, "hidden_act": "relu2", "hidden_size": 4096,
  "initializer_range": 0.0134, "intermediate_size": 16384, "max_position_embeddings": 4096, "mlp_bias": false,
  "model_type": "nemotron", "norm_eps": 1e-05, "num_attention_heads": 48, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "pad_token_id": null,
  "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
  "tie_word_embeddings": false, "transformers_version": "5.0.0", "use_cache": true, "vocab_size": 256000})";

constexpr char kMinitron4B[] = R"({
  "architectures": ["NemotronForCausalLM"], "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "relu2",
  "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 4096, "model_type": "nemotron",
  "num_attention_heads": 24, "head_dim": 128, "num_hidden_layers": 32, "num_key_value_heads": 8, "norm_eps": 1e-05,
  "rope_theta": 10000, "partial_rotary_factor": 0.5, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "vocab_size": 256000})";

constexpr char kMini4BInstruct[] = R"({
  "architectures": ["NemotronForCausalLM"], "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "relu2",
  "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 4096, "model_type": "nemotron",
  "num_attention_heads": 24, "kv_channels": 128, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "norm_eps": 1e-05, "rope_theta": 10000, "partial_rotary_factor": 0.5, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "vocab_size": 256000})";

// The 8B config with `members` added at the end and the text `without` removed.
std::string With(const std::string& members, const std::string& without = "") {
  std::string text = kMinitron8B;
  if (!without.empty()) {
    const size_t at = text.find(without);
    CHECK(at != std::string::npos);
    text.erase(at, without.size());
  }
  const size_t comma = members.empty() ? text.size() : text.rfind('}');
  return members.empty() ? text : text.substr(0, comma) + ", " + members + "}";
}

void ExpectSame(const NemotronConfig& a, const NemotronConfig& b) {
  EXPECT_EQ(a.vocab_size, b.vocab_size);
  EXPECT_EQ(a.hidden_size, b.hidden_size);
  EXPECT_EQ(a.num_layers, b.num_layers);
  EXPECT_EQ(a.num_attention_heads, b.num_attention_heads);
  EXPECT_EQ(a.num_key_value_heads, b.num_key_value_heads);
  EXPECT_EQ(a.head_dim, b.head_dim);
  EXPECT_EQ(a.rotary_dim, b.rotary_dim);
  EXPECT_EQ(a.intermediate_size, b.intermediate_size);
  EXPECT_EQ(a.max_position_embeddings, b.max_position_embeddings);
  EXPECT_EQ(a.norm_eps, b.norm_eps);
  EXPECT_EQ(a.rope_theta, b.rope_theta);
  EXPECT_EQ(a.bos_token_id, b.bos_token_id);
  EXPECT_EQ(a.eos_token_ids, b.eos_token_ids);
}

void ExpectRefused(const std::string& text, const std::string& key, const std::string& value) {
  const auto config = ParseNemotronConfig(text);
  ASSERT_FALSE(config.ok()) << "not refused: " << key << " " << value;
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(key));
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(value));
}

NemotronConfig Parsed(const std::string& text) {
  const auto config = ParseNemotronConfig(text);
  EXPECT_TRUE(config.ok()) << config.status() << "\n" << text;
  return config.ok() ? *config : NemotronConfig();
}

TEST(ModelConfig, Minitron8BHasItsOwnHeadDim) {
  const NemotronConfig config = Parsed(kMinitron8B);
  EXPECT_EQ(config.vocab_size, 256000);
  EXPECT_EQ(config.hidden_size, 4096);
  EXPECT_EQ(config.num_layers, 32);
  EXPECT_EQ(config.num_attention_heads, 48);
  EXPECT_EQ(config.num_key_value_heads, 8);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.rotary_dim, 64);
  EXPECT_EQ(config.intermediate_size, 16384);
  EXPECT_EQ(config.max_position_embeddings, 4096);
  EXPECT_EQ(config.norm_eps, 1e-5f);
  EXPECT_EQ(config.rope_theta, 10000.0f);
  EXPECT_EQ(config.bos_token_id, 2);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(3));
  EXPECT_EQ(config.query_width(), 6144);
  EXPECT_EQ(config.key_value_width(), 1024);
  EXPECT_EQ(config.group_size(), 6);
}

TEST(ModelConfig, EveryUploadOfMinitron8BMeansTheSame) {
  ExpectSame(Parsed(kMinitron8BFirst), Parsed(kMinitron8B));
  ExpectSame(Parsed(kMinitron8BResaved), Parsed(kMinitron8B));
}

TEST(ModelConfig, FourBillionModelsAgree) {
  const NemotronConfig base = Parsed(kMinitron4B);
  EXPECT_EQ(base.num_attention_heads, 24);
  EXPECT_EQ(base.head_dim, 128);
  EXPECT_EQ(base.group_size(), 3);
  ExpectSame(Parsed(kMini4BInstruct), base);
}

TEST(ModelConfig, AbsentKeysTakeTheClassDefaults) {
  const NemotronConfig config = Parsed(R"({"model_type": "nemotron"})");
  EXPECT_EQ(config.vocab_size, 256000);
  EXPECT_EQ(config.hidden_size, 6144);
  EXPECT_EQ(config.intermediate_size, 24576);
  EXPECT_EQ(config.num_layers, 32);
  EXPECT_EQ(config.num_attention_heads, 48);
  EXPECT_EQ(config.num_key_value_heads, 48);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.rotary_dim, 64);
  EXPECT_EQ(config.bos_token_id, 2);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(3));
}

TEST(ModelConfig, NullKeyValueHeadsMeansOnePerQueryHead) {
  const std::string text = With(R"("num_key_value_heads": null)", R"("num_key_value_heads": 8, )");
  EXPECT_EQ(Parsed(text).num_key_value_heads, 48);
}

TEST(ModelConfig, EverySpellingIsAccepted) {
  const std::string factor = R"("partial_rotary_factor": 0.5,)";
  for (const std::string key : {"partial_rotary_factor", "rope_percent", "rope_percentage", "rotary_percent"}) {
    EXPECT_EQ(Parsed(With("\"" + key + "\": 0.25", factor)).rotary_dim, 32) << key;
  }
  EXPECT_EQ(
      Parsed(With(R"("rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25})", factor)).rotary_dim,
      32);
  const std::string eps = R"("norm_eps": 1e-05, )";
  for (const std::string key : {"norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"}) {
    EXPECT_EQ(Parsed(With("\"" + key + "\": 1e-6", eps)).norm_eps, 1e-6f) << key;
  }
  const std::string head_dim = R"("head_dim": 128, )";
  for (const std::string key : {"head_dim", "kv_channels"}) {
    EXPECT_EQ(Parsed(With("\"" + key + "\": 64", head_dim)).head_dim, 64) << key;
  }
  const std::string theta = R"("rope_theta": 10000, )";
  EXPECT_EQ(Parsed(With(R"("rope_parameters": {"rope_theta": 500000})", theta)).rope_theta, 500000.0f);
  EXPECT_EQ(Parsed(With(R"("rope_scaling": {"type": "default"})")).rope_theta, 10000.0f);
  // Two spellings that agree, as in one re-upload.
  EXPECT_EQ(Parsed(With(R"("rope_percent": 0.5, "rope_percentage": 0.5)")).rotary_dim, 64);
}

TEST(ModelConfig, ContradictingSpellingsAreRefused) {
  ExpectRefused(With(R"("kv_channels": 85)"), "head_dim 128 contradicts", "kv_channels 85");
  ExpectRefused(With(R"("rope_percent": 1.0)"), "partial_rotary_factor 0.5 contradicts", "rope_percent 1");
  ExpectRefused(With(R"("layer_norm_eps": 1e-6)"), "norm_eps", "contradicts layer_norm_eps");
  ExpectRefused(With(R"("rope_parameters": {"rope_theta": 1000000})"), "rope_theta 10000 contradicts",
                "rope_parameters.rope_theta 1000000");
  ExpectRefused(With(R"("rope_parameters": {"partial_rotary_factor": 0.25})"), "partial_rotary_factor 0.5 contradicts",
                "rope_parameters.partial_rotary_factor 0.25");
  ExpectRefused(With(R"("dtype": "float16")"), "torch_dtype \"bfloat16\" contradicts", "dtype \"float16\"");
  ExpectRefused(With(R"("head_dim": 128)"), "duplicate key", "head_dim");
}

TEST(ModelConfig, OtherArchitecturesAreRefused) {
  ExpectRefused(R"({"model_type": "llama"})", "model_type", "\"llama\"");
  ExpectRefused(R"({"model_type": "nemotron_h"})", "model_type", "\"nemotron_h\"");
  ExpectRefused(R"({"model_type": 7})", "model_type", "7");
  ExpectRefused(R"({})", "model_type", "missing");
  ExpectRefused(R"({"model_type": "nemotron", "architectures": ["LlamaForCausalLM"]})", "architectures",
                "LlamaForCausalLM");
  ExpectRefused(R"({"model_type": "nemotron", "architectures": []})", "architectures", "[]");
  ExpectRefused(R"({"architectures": "NemotronForCausalLM"})", "architectures", "NemotronForCausalLM");
}

TEST(ModelConfig, UnsupportedVariantsAreRefused) {
  const std::string start = R"({"model_type": "nemotron", )";
  for (const std::string key : {"attention_bias", "mlp_bias", "tie_word_embeddings"}) {
    ExpectRefused(start + "\"" + key + "\": true}", key, "true");
    ExpectRefused(start + "\"" + key + "\": 0}", key, "0");
    EXPECT_TRUE(ParseNemotronConfig(start + "\"" + key + "\": false}").ok()) << key;
  }
  for (const std::string act : {"\"silu\"", "\"relu\"", "\"gelu\"", "7"}) {
    ExpectRefused(start + "\"hidden_act\": " + act + "}", "hidden_act", act);
  }
  ExpectRefused(start + R"("rope_scaling": {"type": "linear", "factor": 2}})", "rope_scaling.type", "linear");
  ExpectRefused(start + R"("rope_scaling": {"rope_type": "llama3"}})", "rope_scaling.rope_type", "llama3");
  ExpectRefused(start + R"("rope_scaling": {"factor": 2}})", "rope_scaling", "factor");
  ExpectRefused(start + R"("rope_scaling": 2})", "rope_scaling", "2");
  ExpectRefused(start + R"("rope_parameters": {"rope_type": "yarn"}})", "rope_parameters.rope_type", "yarn");
  ExpectRefused(start + R"("rope_parameters": {"rope_type": null}})", "rope_parameters.rope_type", "null");
  ExpectRefused(start + R"("rope_parameters": []})", "rope_parameters", "[]");
  ExpectRefused(start + R"("quantization_config": {"quant_method": "gptq"}})", "quantization_config", "supported: ");
  ExpectRefused(start + R"("quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}})",
                "quantization_config", "float-quantized");
  ExpectRefused(start + R"("quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})",
                "quantization_config.weight_block_size", "[128");
  ExpectRefused(start + R"("quantization_config": "fp8"})", "quantization_config", "fp8");
  ExpectRefused(start + R"("torch_dtype": "float8_e4m3fn"})", "torch_dtype", "float8_e4m3fn");
  ExpectRefused(start + R"("dtype": 16})", "dtype", "16");
}

TEST(ModelConfig, CheckpointsInFp8AreRead) {
  const std::string start = R"({"model_type": "nemotron", "quantization_config": )";
  for (const std::string quantization :
       {R"({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]})",
        R"({"quant_method": "fp8", "weight_block_size": null})",
        R"({"quant_method": "compressed-tensors", "format": "float-quantized"})", "null"}) {
    const auto config = ParseNemotronConfig(start + quantization + "}");
    EXPECT_TRUE(config.ok()) << config.status();
  }
}

TEST(ModelConfig, ValuesOutOfRangeAreRefused) {
  const std::string start = R"({"model_type": "nemotron", )";
  for (const std::string key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"}) {
    for (const std::string value : {"0", "-1", "2147483648", "9223372036854775807", "1.5", "\"8\"", "true", "[8]"}) {
      ExpectRefused(start + "\"" + key + "\": " + value + "}", key, value);
    }
  }
  for (const std::string key : {"vocab_size", "hidden_size", "num_hidden_layers"}) {
    ExpectRefused(start + "\"" + key + "\": null}", key, "null");
  }
  ExpectRefused(start + R"("hidden_size": 18446744073709551615})", "hidden_size", "1.84467441e+19");
  ExpectRefused(start + R"("num_attention_heads": 48, "num_key_value_heads": 7})", "num_key_value_heads", "7");
  ExpectRefused(start + R"("num_attention_heads": 8, "num_key_value_heads": 16})", "num_key_value_heads", "16");
  ExpectRefused(start + R"("head_dim": 100})", "head_dim", "100");
  ExpectRefused(start + R"("head_dim": 4})", "head_dim", "4");
  for (const std::string value : {"0", "-0.5", "1.5", "0.3", "\"0.5\""}) {
    ExpectRefused(start + "\"partial_rotary_factor\": " + value + "}", "partial_rotary_factor",
                  value == "0" ? "0" : value);
  }
  ExpectRefused(start + R"("head_dim": 8, "partial_rotary_factor": 0.375})", "partial_rotary_factor",
                "3 of head_dim 8");
  for (const std::string value : {"0", "-1e-5", "1.0", "\"1e-5\""}) {
    ExpectRefused(start + "\"norm_eps\": " + value + "}", "norm_eps", "");
  }
  for (const std::string value : {"0", "-10000", "1e300", "\"10000\""}) {
    EXPECT_FALSE(ParseNemotronConfig(start + "\"rope_theta\": " + value + "}").ok()) << value;
  }
}

TEST(ModelConfig, NumbersThatAreNotFiniteAreRefused) {
  for (const std::string value : {"NaN", "Infinity", "-Infinity", "1e999", "-1e999"}) {
    for (const std::string key : {"norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range"}) {
      EXPECT_FALSE(ParseNemotronConfig(R"({"model_type": "nemotron", ")" + key + "\": " + value + "}").ok())
          << key << value;
    }
  }
}

TEST(ModelConfig, HeadDimIsNeverGuessed) {
  ExpectRefused(With("", R"("head_dim": 128, )"), "head_dim missing", "4096");
  // 3072 / 24 is what the class would compute, and right.
  std::string four = kMinitron4B;
  four.erase(four.find(R"("head_dim": 128, )"), std::string(R"("head_dim": 128, )").size());
  ExpectSame(Parsed(four), Parsed(kMinitron4B));
  ExpectRefused(R"({"model_type": "nemotron", "hidden_size": 480})", "head_dim 10", "multiple of 8");
}

TEST(ModelConfig, TokenIdsMustBeInTheVocabulary) {
  const std::string start = R"({"model_type": "nemotron", "vocab_size": 100, )";
  EXPECT_THAT(Parsed(start + R"("eos_token_id": [3, 99, 3]})").eos_token_ids, ElementsAre(3, 99));
  ExpectRefused(start + R"("eos_token_id": 100})", "eos_token_id", "100");
  ExpectRefused(start + R"("eos_token_id": [3, -1]})", "eos_token_id", "-1");
  ExpectRefused(start + R"("eos_token_id": []})", "eos_token_id", "[]");
  ExpectRefused(start + R"("eos_token_id": "3"})", "eos_token_id", "\"3\"");
  ExpectRefused(start + R"("bos_token_id": 100})", "bos_token_id", "100");
  ExpectRefused(start + R"("bos_token_id": [2]})", "bos_token_id", "[2]");
  ExpectRefused(R"({"model_type": "nemotron", "vocab_size": 3})", "vocab_size 3", "token id 3");
}

TEST(ModelConfig, MalformedTextIsRefusedWithoutRecursion) {
  for (const std::string text : {"", "{", "[]", "null", "{} {}", "{\"a\": }", "\xff", "{\"a\": \"\xc3\"}"}) {
    EXPECT_EQ(ParseNemotronConfig(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  EXPECT_FALSE(ParseNemotronConfig(std::string(kMinitron8B) + std::string(1, '\0') + "trailing").ok());
  ExpectRefused("{\"a\": " + std::string(100'000, '[') + std::string(100'000, ']') + "}", "nested deeper", "64");
  ExpectRefused(std::string(2 << 20, ' ') + kMinitron8B, "bytes of JSON", "1048576");
}

TEST(ModelConfig, TruncationAtEveryByteIsRefused) {
  const std::string text = kMinitron8BResaved;
  for (size_t length = 0; length < text.size(); ++length) {
    ASSERT_FALSE(ParseNemotronConfig(text.substr(0, length)).ok()) << length;
  }
}

TEST(LoadNemotronConfig, GenerationConfigOverridesTokenIds) {
  const testing::TempDir dir;
  dir.Write("config.json", kMinitron8B);
  EXPECT_THAT(LoadNemotronConfig(dir.path())->eos_token_ids, ElementsAre(3));
  dir.Write("generation_config.json", R"({"eos_token_id": [3, 5], "bos_token_id": null})");
  EXPECT_THAT(LoadNemotronConfig(dir.path())->eos_token_ids, ElementsAre(3, 5));
  EXPECT_EQ(LoadNemotronConfig(dir.path())->bos_token_id, 2);
  dir.Write("generation_config.json", R"({"eos_token_id": 256000})");
  const auto refused = LoadNemotronConfig(dir.path());
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("generation_config.json: eos_token_id 256000"));
}

TEST(LoadNemotronConfig, AbsentFilesAreNotFound) {
  const testing::TempDir dir;
  EXPECT_EQ(LoadNemotronConfig(dir.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(LoadNemotronConfig(dir.File("absent")).status().code(), absl::StatusCode::kNotFound);
}

TEST(LoadNemotronConfig, ErrorsNameTheFile) {
  const testing::TempDir dir;
  dir.Write("config.json", R"({"model_type": "llama"})");
  EXPECT_THAT(std::string(LoadNemotronConfig(dir.path()).status().message()), HasSubstr("config.json: model_type"));
}

TEST(LoadGenerationDefaults, ReadsWhatIsThere) {
  const testing::TempDir dir;
  const auto none = LoadGenerationDefaults(dir.path());
  ASSERT_TRUE(none.ok());
  EXPECT_FALSE(none->has_temperature || none->has_top_k || none->has_top_p);
  dir.Write("generation_config.json", R"({"do_sample": true, "temperature": 0.8, "top_p": 0.95, "top_k": 50})");
  const auto some = LoadGenerationDefaults(dir.path());
  ASSERT_TRUE(some.ok());
  EXPECT_TRUE(some->has_temperature && some->has_top_k && some->has_top_p);
  EXPECT_EQ(some->temperature, 0.8f);
  EXPECT_EQ(some->top_k, 50);
  EXPECT_EQ(some->top_p, 0.95f);
  dir.Write("generation_config.json", R"({"do_sample": false, "temperature": 0.8})");
  EXPECT_EQ(LoadGenerationDefaults(dir.path())->temperature, 0.0f);
}

TEST(LoadGenerationDefaults, ValuesOutOfRangeAreRefused) {
  const testing::TempDir dir;
  for (const std::string text : {R"({"temperature": 3.5})", R"({"top_p": 0})", R"({"top_p": 1.1})", R"({"top_k": -1})",
                                 R"({"do_sample": 1})", R"({"temperature": "hot"})", "[]", "{"}) {
    dir.Write("generation_config.json", text);
    EXPECT_EQ(LoadGenerationDefaults(dir.path()).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace minitron::engine
