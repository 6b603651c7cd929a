// Every float of SamplingConfig with its limits, for the tests that try both ends of each.
#pragma once

#include <minitron/v1/generation.pb.h>

#include "server/limits.h"

namespace minitron::server {

struct FloatField {
  FloatLimit limit;
  void (*set)(v1::SamplingConfig& config, float value);
};

inline constexpr FloatField kFloatFields[] = {
    {limits::kTemperature, [](v1::SamplingConfig& config, float value) { config.set_temperature(value); }},
    {limits::kTopP, [](v1::SamplingConfig& config, float value) { config.set_top_p(value); }},
    {limits::kMinP, [](v1::SamplingConfig& config, float value) { config.set_min_p(value); }},
    {limits::kRepetitionPenalty, [](v1::SamplingConfig& config, float value) { config.set_repetition_penalty(value); }},
    {limits::kPresencePenalty, [](v1::SamplingConfig& config, float value) { config.set_presence_penalty(value); }},
    {limits::kFrequencyPenalty, [](v1::SamplingConfig& config, float value) { config.set_frequency_penalty(value); }},
    {limits::kLogitBias, [](v1::SamplingConfig& config, float value) { (*config.mutable_logit_bias())[7] = value; }},
};

}  // namespace minitron::server
