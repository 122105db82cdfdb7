// What the operator policy_loss hands to its kernels, free of torch.
#pragma once

#include "cuda/policy_loss_kernels.h"
#include "cuda/selection.h"

namespace entropy_kernels::cuda {

TeamPlan plan_policy_loss(int64_t tokens, int device);
// The chunk is set here, from the plan.
void launch_policy_loss(const TeamPlan& plan, PolicyLossArguments arguments, cudaStream_t stream);

}  // namespace entropy_kernels::cuda
