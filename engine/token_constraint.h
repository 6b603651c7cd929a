// TokenConstraint: which tokens a sequence may continue with, as a walk over states. Made by server/, asked by the
// sampler; immutable, so any thread.
#pragma once

#include <cstdint>

#include "absl/types/span.h"

namespace minitron::engine {

class TokenConstraint {
 public:
  using State = uint32_t;

  virtual ~TokenConstraint() = default;

  virtual State start() const = 0;
  // The state after `token`, which must be allowed in `state`. At most as many look-ups as the token has bytes.
  virtual State Advance(State state, int32_t token) const = 0;
  // One bit per token id, lowest first: who may come next; at least one may. Ids past the end may not.
  virtual absl::Span<const uint64_t> Allowed(State state) const = 0;
};

}  // namespace minitron::engine
