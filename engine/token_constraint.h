// TokenConstraint: which tokens a sequence may continue with. Made by server/; immutable, so any thread. TokenWalk: how
// far one sequence has come in it. The sampler's; one thread at a time.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/types/span.h"

namespace minitron::engine {

class TokenWalk {
 public:
  virtual ~TokenWalk() = default;

  // Goes on by `token`, which must be allowed.
  virtual void Advance(int32_t token) = 0;
  // One bit per token id, lowest first: who may come next; ids past the end may not. Valid until the next Advance.
  // If nobody may, the sequence fails.
  virtual absl::Span<const uint64_t> Allowed() = 0;
};

class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  // A walk at the start. The constraint must outlive its last use.
  virtual std::unique_ptr<TokenWalk> NewWalk() const = 0;
};

}  // namespace minitron::engine
