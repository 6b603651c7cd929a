// BuildBatch: the plan of a step as the arrays the runner takes. A pure function.
#pragma once

#include "engine/batch.h"
#include "scheduler/scheduler_output.h"

namespace minitron::scheduler {

// The batch borrows params and banned tokens from the plan's sequences: keep the plan until Collect.
// Result rows are in the order Scheduler::Update expects them.
// The arrays' memory is that of `recycled`.
engine::Batch BuildBatch(const SchedulerOutput& plan, engine::Batch recycled = {});

}  // namespace minitron::scheduler
