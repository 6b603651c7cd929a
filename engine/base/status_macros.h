// RETURN_IF_ERROR and ASSIGN_OR_RETURN over absl::Status and absl::StatusOr.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// `lhs` is a declaration or an lvalue, which parentheses would break: NOLINT for the whole file's macros.
// NOLINTBEGIN(bugprone-macro-parentheses)
#define MINITRON_CONCAT_INNER(a, b) a##b
#define MINITRON_CONCAT(a, b) MINITRON_CONCAT_INNER(a, b)

// Returns the status of `expression` from the enclosing function unless it is OK.
#define RETURN_IF_ERROR(expression)                                       \
  do {                                                                    \
    if (absl::Status status_macro_ = (expression); !status_macro_.ok()) { \
      return status_macro_;                                               \
    }                                                                     \
  } while (false)

// Evaluates a StatusOr; on error returns its status, else assigns its value to `lhs`.
#define ASSIGN_OR_RETURN(lhs, expression) \
  MINITRON_ASSIGN_OR_RETURN(MINITRON_CONCAT(status_or_, __LINE__), lhs, expression)
#define MINITRON_ASSIGN_OR_RETURN(status_or, lhs, expression) \
  auto status_or = (expression);                              \
  if (!status_or.ok()) return std::move(status_or).status();  \
  lhs = std::move(status_or).value()
// NOLINTEND(bugprone-macro-parentheses)
