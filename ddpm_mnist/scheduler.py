"""The forward and reverse processes of DDPM, in discrete time t = 0 ... T-1 (the paper's t is ours plus one).

Ho et al. 2020 (https://arxiv.org/abs/2006.11239).

Forward: T small steps add Gaussian noise to an image; their variances are the betas. With alpha_t = 1 - beta_t and
alphas_cumprod_t = prod_{s<=t} alpha_s (alpha-bar_t), x_t has a closed form (eq. 4), which `add_noise` computes:

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) epsilon,    epsilon ~ N(0, I)

Reverse: `step` draws x_{t-1} ~ N(mu_t, sigma_t^2 I), given x_t and the network's prediction (eqs. 6, 7 and 15).

`DDPMScheduler` is a drop-in replacement for `diffusers.DDPMScheduler`: the same arguments, config keys and, with the
same random generator, the same numbers. The paper is written out here. What it does not need is inherited: other betas
and variances, the velocity v (loss.py has its formula), and which timesteps to visit in fewer than T steps.
"""

from functools import wraps

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class DDPMScheduler(diffusers.DDPMScheduler):
    """Noise schedule, forward process and ancestral sampler, with the arguments of `diffusers.DDPMScheduler`.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: the betas, by formula or as a list of T numbers.
        variance_type: sigma_t^2 of the reverse step. "fixed_small" is beta-tilde_t (eq. 7), "fixed_large" is beta_t
            (both: section 3.2). "learned" and "learned_range" read it from the second half of the model's channels.
        prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction".
        clip_sample, clip_sample_range: clamp the predicted x_0 to [-clip_sample_range, clip_sample_range].
        timestep_spacing, steps_offset: which t to visit in fewer than T steps.
        The others: see `diffusers.DDPMScheduler`.

    Raises:
        ValueError: unknown `prediction_type`. NotImplementedError: unknown `beta_schedule`.
    """

    @wraps(diffusers.DDPMScheduler.__init__)  # its signature is the list of options and their defaults
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)  # the config, all T timesteps, and the betas by other formulas
        config = self.config
        if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type={config.prediction_type!r}: choose from epsilon, sample, v_prediction")
        if config.beta_schedule == "linear" and config.trained_betas is None and not config.rescale_betas_zero_snr:
            T = config.num_train_timesteps
            self.betas = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float32)  # section 4
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

    # ---- forward process -------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0), eq. 4.

        Args:
            original_samples: x_0, `[B, ...]`, images in [-1, 1]. Keep it in float32 when training in mixed precision:
                in half precision 1 - beta rounds to 1 for small beta, and the first timesteps would add no noise.
            noise: epsilon ~ N(0, I), shaped like `original_samples`.
            timesteps: `[B]` (or `[1]`), int64, 0 <= t < T.
        """
        self.alphas_cumprod = self.alphas_cumprod.to(original_samples.device)  # copied at the first call only
        alpha_prod = self.alphas_cumprod.to(original_samples.dtype)[timesteps.to(original_samples.device)]
        alpha_prod = alpha_prod.reshape(-1, *[1] * (original_samples.ndim - 1))
        return alpha_prod**0.5 * original_samples + (1 - alpha_prod) ** 0.5 * noise

    # ---- reverse process -------------------------------------------------------------------------------------------

    def predict_original_sample(self, model_output: Tensor, alpha_prod: Tensor, sample: Tensor) -> Tensor:
        """The predicted x_0, `[B, C, H, W]`: eq. 15 for epsilon, then clipped to the range of images.

        Args:
            model_output: the network's prediction, as `prediction_type` says, `[B, C, H, W]`.
            alpha_prod: alpha-bar_t, one for all or `[B, 1, 1, 1]`.
            sample: x_t, `[B, C, H, W]`.
        """
        if self.config.prediction_type == "epsilon":
            pred_original_sample = (sample - (1 - alpha_prod) ** 0.5 * model_output) / alpha_prod**0.5
        elif self.config.prediction_type == "sample":
            pred_original_sample = model_output
        else:
            pred_original_sample = alpha_prod**0.5 * sample - (1 - alpha_prod) ** 0.5 * model_output
        if self.config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if self.config.clip_sample:
            clip = self.config.clip_sample_range
            return pred_original_sample.clamp(-clip, clip)
        return pred_original_sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of Algorithm 2: from x_t and the network's prediction to x_{t-1}.

        Args:
            model_output: `[B, C, ...]`, or `[B, 2C, ...]` with a learned variance.
            timestep: t, the same for the whole batch, one of `self.timesteps`.
            sample: x_t, `[B, C, ...]`.
            generator: the source of the step's noise.
            return_dict: False for the tuple `(prev_sample, pred_original_sample)`.
        """
        if self.variance_type not in ("fixed_small", "fixed_large"):  # not in the paper
            return super().step(model_output, timestep, sample, generator, return_dict)
        prev_timestep = self.previous_timestep(timestep)
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.one
        alpha = alpha_prod / alpha_prod_prev  # alpha_t; with skipped timesteps, their product

        # 1. the predicted x_0
        pred_original_sample = self.predict_original_sample(model_output, alpha_prod, sample)

        # 2. the mean of q(x_{t-1} | x_t, x_0), eq. 7: that of eq. 11, if x_0 was not clipped
        original_coeff = alpha_prod_prev**0.5 * (1 - alpha) / (1 - alpha_prod)
        current_coeff = alpha**0.5 * (1 - alpha_prod_prev) / (1 - alpha_prod)
        prev_sample = original_coeff * pred_original_sample + current_coeff * sample

        # 3. noise of variance sigma_t^2, except at the last step (Algorithm 2, line 3)
        if timestep > 0:
            variance = 1 - alpha  # beta_t: "fixed_large"
            if self.variance_type == "fixed_small":  # beta-tilde_t, eq. 7
                variance = torch.clamp((1 - alpha_prod_prev) / (1 - alpha_prod) * variance, min=1e-20)
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + variance**0.5 * noise

        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
