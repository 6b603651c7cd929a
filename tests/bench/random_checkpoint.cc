#include "tests/bench/random_checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <utility>

#include "tests/bench/random_value.h"

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

std::string Header(const std::vector<TensorSpec>& tensors) {
  std::string header = "{";
  int64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    const int64_t end = offset + 2 * tensor.NumElements();
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

constexpr int64_t kPartElements = 4 << 20;  // what a thread makes at a time

struct Part {
  const TensorSpec* tensor;
  int64_t first, count, offset;  // elements, elements, bytes into the file
};

// A new file of a size, mapped for writing. data() is null when that failed, and error() says why.
class MappedOutput {
 public:
  MappedOutput(const std::string& path, int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)) {
    const int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    struct statvfs room = {};
    if (file >= 0 && fstatvfs(file, &room) == 0) {
      const auto free_bytes = static_cast<uint64_t>(room.f_bavail) * room.f_frsize;
      if (free_bytes < num_bytes_) {  // found out later, it would be a signal
        error_ = std::to_string(num_bytes_) + " bytes, but there is room for " + std::to_string(free_bytes);
      } else if (ftruncate(file, num_bytes) == 0) {
        void* const memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory != MAP_FAILED) data_ = static_cast<unsigned char*>(memory);
      }
    }
    if (data_ == nullptr && error_.empty()) error_ = std::strerror(errno);
    if (file >= 0) close(file);
  }
  MappedOutput(const MappedOutput&) = delete;
  MappedOutput& operator=(const MappedOutput&) = delete;
  ~MappedOutput() {
    if (data_ != nullptr) munmap(data_, num_bytes_);
  }
  unsigned char* data() const { return data_; }
  const std::string& error() const { return error_; }

 private:
  const size_t num_bytes_;
  unsigned char* data_ = nullptr;
  std::string error_;
};

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
  } else if (name == "test") {
    config = Shape(2, 128, 6, 1, 256, 1024);
  } else {
    return false;
  }
  return true;
}

int64_t TensorSpec::NumElements() const {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

std::vector<TensorSpec> TensorSpecs(const engine::NemotronConfig& c, uint64_t seed) {
  std::vector<TensorSpec> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape, float scale) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    tensors.push_back({name, std::move(shape), scale, seed});
  };
  const auto matrix = [&](const std::string& name, int64_t outs, int64_t ins) {
    add(name, {outs, ins}, std::sqrt(3.0f / static_cast<float>(ins)));
  };
  const auto norm = [&](const std::string& name) {
    add(name + ".weight", {c.hidden_size}, 0.1f);
    add(name + ".bias", {c.hidden_size}, 0.05f);
  };
  add("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, 1.0f);
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
  for (int64_t i = 0; i < count; ++i) out[i] = RandomBf16Value(seed, static_cast<uint64_t>(first + i), scale);
}

bool WriteRandomCheckpoint(const std::string& dir, const engine::NemotronConfig& config, uint64_t seed) {
  std::ofstream(dir + "/config.json") << ConfigJson(config);
  const std::vector<TensorSpec> tensors = TensorSpecs(config, seed);
  const std::string header = Header(tensors);
  std::vector<Part> parts;
  int64_t offset = static_cast<int64_t>(sizeof(uint64_t) + header.size());
  for (const TensorSpec& tensor : tensors) {
    for (int64_t first = 0; first < tensor.NumElements(); first += kPartElements) {
      parts.push_back({&tensor, first, std::min(kPartElements, tensor.NumElements() - first), offset + 2 * first});
    }
    offset += 2 * tensor.NumElements();
  }
  const std::string path = dir + "/model.safetensors";
  // Mapped, not written: the threads of one file's write() wait for each other.
  const MappedOutput file(path, offset);
  if (file.data() == nullptr) {
    std::fprintf(stderr, "cannot write %s: %s\n", path.c_str(), file.error().c_str());
    return false;
  }
  const uint64_t length = header.size();
  std::memcpy(file.data(), &length, sizeof(length));  // little-endian hosts only
  std::memcpy(file.data() + sizeof(length), header.data(), header.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < parts.size(); i = next++) {
        const Part& part = parts[i];
        RandomBf16(part.tensor->seed, part.first, part.count, part.tensor->scale,
                   reinterpret_cast<uint16_t*>(file.data() + part.offset));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return true;
}

}  // namespace minitron::bench
