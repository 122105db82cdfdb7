// Covariance, selection, policy term, its derivative and the sums of the metrics, in one launch.
#pragma once

#include <cstdint>

#include "common/policy_term.h"
#include "cuda/covariance_kernels.h"
#include "cuda/selection_kernels.h"

namespace entropy_kernels::cuda {

struct PolicyLossArguments {
  const float* old_logprob;
  PolicyClips<float> clips;
  Selected selected;           // what becomes of selected tokens
  bool select;                 // whether they are selected here: else they are given, or there are none
  bool exclude_clipped;        // tokens that the PPO clip holds are no candidates
  const uint8_t* given;        // null: none
  Penalty penalty;
  bool square_slope;
  const float* coefficient;    // () of the penalty; null without one
  float* term;                 // (N,)
  float* slope;                // (N,) derivative of the term by logprob
  double* totals;              // (kPolicyTotals,)
  float* mean;                 // () of the term over the valid tokens
  float* metrics;              // (kPolicyMetrics,)
  double* partials;            // (blocks, kPolicySums), Grid only
  bool covariance_given;       // and not to be written
  CovarianceArguments<float> covariance;
  SelectionArguments selection;  // its covariance and, where clipped tokens are excluded, `exclude` are written here
};

struct PolicyLossShared {
  double warps[kLanes][kPolicySums];
  double sums[kPolicySums];
  double totals[kPolicyTotals];
};

template <class Team>
EK_HOST_DEVICE void policy_loss_block(Team& team, SearchShared& search, PolicyLossShared& shared,
                                      const PolicyLossArguments& a, KeyStore store) {
  struct Token {
    float logprob, old_logprob, advantage, covariance;
    bool valid, selected;
  };
  constexpr int kMaximumSlot = kCovarianceSlots;
  const CovarianceArguments<float>& c = a.covariance;
  const TokenShare share(team.thread.block(), c.chunk, c.tokens);
  const auto valid_at = [&](int64_t position) { return c.mask == nullptr || c.mask[position] != 0; };
  const auto branch_of = [&](const Token& token) {
    return policy_branch(token.logprob, token.old_logprob, token.advantage, token.valid, a.clips);
  };

  if (!a.covariance_given) {
    covariance_block(team, c);
  }
  // Each thread comes back to the tokens that it has written: no barrier is needed in between.
  KeyBand band = {1, 0};
  uint8_t* selected = a.selection.selected;
  if (a.select) {
    if (a.exclude_clipped) {
      // The flags stand where the mask will be: who reads one has written it, and writes the mask last.
      for_tokens(
          team, share.tokens,
          [&](int i) {
            const int64_t position = share.begin + i;
            return Token{c.logprob[position], a.old_logprob[position], c.advantages[position], 0, valid_at(position),
                         false};
          },
          [&](int i, const Token& token) {
            if (i < share.tokens) {
              selected[share.begin + i] = branch_of(token).clipped;
            }
          });
    }
    const KeyBand candidates = Selector<Team>(team, search, a.selection, store).run();
    band = a.selection.seed != nullptr ? candidates : band;
  }

  const uint8_t* chosen = a.select ? selected : a.given;
  const float coefficient = a.coefficient != nullptr ? *a.coefficient : 0;
  float sums[kPolicySums] = {};
  uint32_t largest_ratio = 0, largest_covariance = 0;
  for_tokens<2>(  // with more, registers would not do
      team, share.tokens,
      [&](int i) {
        const int64_t position = share.begin + i;
        return Token{c.logprob[position],    a.old_logprob[position], c.advantages[position],
                     c.covariance[position], valid_at(position),      chosen != nullptr && chosen[position] != 0};
      },
      [&](int i, const Token& token) {
        const bool acted_on = token.selected && token.valid;
        const PolicyBranch<float> branch = branch_of(token);
        const PolicyTerm<float> term =
            penalised_term(branch, token.valid, acted_on ? a.selected : Selected::kUnchanged, a.penalty,
                           a.square_slope, coefficient);
        if (i < share.tokens) {
          a.term[share.begin + i] = term.value;
          a.slope[share.begin + i] = term.slope;
        }
        const bool candidate = token.valid && band.contains(ordered_key(token.covariance)) &&
                               token.covariance == token.covariance && !(a.exclude_clipped && branch.clipped);
        add_to_sums(sums, branch, term, token.covariance, token.valid, candidate, acted_on);
        if (token.valid) {
          largest_ratio = larger_key(largest_ratio, branch.ratio);
          largest_covariance = larger_key(largest_covariance, token.covariance);
        }
      });

  // In a fixed order, whoever comes first: lanes by a tree, then warps, then blocks.
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) {
    double sum = sums[k];
    if (is_count(k)) {  // one instruction for the warp, and exact
      sum = team.thread.warp_sum(static_cast<uint32_t>(sums[k]));
    } else {
      for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        sum += team.thread.shuffle_xor(sum, mask);
      }
    }
    if (team.lane() == 0) {
      shared.warps[team.warp()][k] = sum;
    }
  }
  team.add_maximum(kMaximumSlot + kRatioMaximum, largest_ratio);
  team.add_maximum(kMaximumSlot + kCovarianceMaximum, largest_covariance);
  team.thread.barrier();
  if (team.thread.index() < kPolicySums) {
    double sum = 0;
    for (int warp = 0; warp < Team::kThreads / kLanes; ++warp) {
      sum += shared.warps[warp][team.thread.index()];
    }
    shared.sums[team.thread.index()] = sum;
    if (a.partials != nullptr) {
      a.partials[team.thread.block() * kPolicySums + team.thread.index()] = sum;
    }
  }
  team.combine_slots(kMaximumSlot, kPolicyMaxima, 0);
  if (team.thread.block() == 0) {
    const int index = team.thread.index();
    if (index < kPolicySums) {
      double sum = 0;
      for (int block = 0; block < team.thread.blocks(); ++block) {
        sum += team.partial(shared.sums, a.partials, block, kPolicySums, index);
      }
      shared.totals[index] = sum;
    } else if (index < kPolicyTotals) {
      const auto key = static_cast<uint32_t>(team.shared.totals[kMaximumSlot + index - kPolicySums]);
      shared.totals[index] = maximum_of_key(key);
    }
    team.thread.barrier();
    if (index < kPolicyTotals) {
      a.totals[index] = shared.totals[index];
    }
    if (index < kPolicyMetrics) {
      a.metrics[index] = static_cast<float>(policy_metric(shared.totals, index));
    }
    if (index == 0) {
      *a.mean = static_cast<float>(policy_metric(shared.totals, kTermSum));
    }
  }
}

}  // namespace entropy_kernels::cuda
