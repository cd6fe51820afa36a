"""The network of DDPM, epsilon_theta(x_t, t), or v: a U-Net from a noisy image and its timestep to an image.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), section 4 and appendix B: residual blocks with group normalisation,
self-attention at low resolution, and a sinusoidal embedding of the timestep, which enters every residual block. All
timesteps share the weights.

`UNet2DModel` is a drop-in replacement for `diffusers.UNet2DModel`: it has the same arguments, config keys, parameter
names and numbers, so each reads state dicts and folders that the other wrote. The usual network is written out here.
One with a rare option (see `is_usual`) is built and run by diffusers' own code.

The usual network is faster than stock, with the same numbers up to rounding, through channels_last memory, `normalize`,
`attend` and `Upsample2D`. Each place says why.
"""

from functools import partial, wraps
from inspect import signature

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

USUAL = {  # a network that has another value for one of these options is left to diffusers' code
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
}


def normalize(norm: nn.GroupNorm, hidden_states: Tensor) -> Tensor:
    """Apply a group norm, with statistics in float32.

    On a CPU in half precision, PyTorch's kernel takes 4 to 14 times as long for channels_last memory as for contiguous
    memory. Converting to contiguous and back costs less, forward and backward.
    """
    if hidden_states.device.type != "cpu" or hidden_states.dtype.itemsize > 2:
        return norm(hidden_states)
    return norm(hidden_states.contiguous()).contiguous(memory_format=torch.channels_last)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, eq. 1): `[B, heads, tokens, d] -> [B, heads, tokens, d]`.

    Up to 64 tokens on a CPU it is written out, because the backward pass of PyTorch's fused kernel takes 5 to 10 times
    as long in bfloat16. Beyond that the fused kernel saves the memory of a tokens x tokens matrix.
    """
    if query.device.type != "cpu" or query.shape[-2] > 64:
        return F.scaled_dot_product_attention(query, key, value)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


class ResnetBlock2D(nn.Module):
    """Residual block: x + conv(silu(norm(conv(silu(norm(x))) + time))).

    Maps `[B, in_channels, H, W]` and the time embedding, `[B, temb_channels]`, to `[B, out_channels, H, W]`.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, norm, dropout: float, act_fn: str):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = get_activation(act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        residual = hidden_states
        time = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]  # one value per channel, at every pixel
        hidden_states = self.conv1(self.nonlinearity(normalize(self.norm1, hidden_states)))
        hidden_states = self.nonlinearity(normalize(self.norm2, hidden_states + time))
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return residual + hidden_states


class Attention(nn.Module):
    """Self-attention between all pixels, with a residual connection: `[B, C, H, W] -> [B, C, H, W]`."""

    _from_deprecated_attn_block = True  # lets ModelMixin rename the keys of checkpoints from before diffusers 0.15

    def __init__(self, channels: int, head_dim: int | None, norm):
        super().__init__()
        head_dim = channels if head_dim is None else head_dim
        if not 1 <= head_dim <= channels:
            raise ValueError(f"attention_head_dim={head_dim!r} must lie between 1 and the width, {channels}")
        self.heads = channels // head_dim
        inner_dim = self.heads * head_dim
        self.group_norm = norm(channels)
        self.to_q = nn.Linear(channels, inner_dim)
        self.to_k = nn.Linear(channels, inner_dim)
        self.to_v = nn.Linear(channels, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, channels), nn.Dropout(0.0)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = normalize(self.group_norm, hidden_states)
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, C]; no copy from channels_last memory
        query, key, value = (  # each [B, heads, HW, head_dim]
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        tokens = self.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))
        return tokens.unflatten(1, hidden_states.shape[-2:]).permute(0, 3, 1, 2) + hidden_states


class Downsample2D(nn.Module):
    """Halve the resolution: `[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]`; rounded down if padding is 0."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.padding == 0:  # as in the original TensorFlow code: pad on the right and at the bottom only
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether the layer is a plain Conv2d, not changed by LoRA, offloading, casting or hooks."""
    changed = "forward" in vars(conv) or conv._forward_hooks or conv._forward_pre_hooks
    return type(conv) is nn.Conv2d and not changed


class Upsample2D(nn.Module):
    """Repeat each pixel in a 2x2 square, then convolve 3x3: `[B, C, H, W] -> [B, C, 2H, 2W]`.

    Several of the nine weights at an output pixel multiply the same input pixel. Adding those weights first gives a
    transposed convolution with stride 2 and a 4x4 kernel (the 3x3 kernel convolved with a 2x2 kernel of ones): four
    products a pixel instead of nine. This is faster in float32 on a CPU, where products dominate the time.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        device, half = hidden_states.device.type, hidden_states.dtype.itemsize <= 2
        if device != "cpu" or half or torch.is_autocast_enabled(device) or not is_plain(self.conv):
            return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        flipped = self.conv.weight.flip(2, 3).transpose(0, 1)  # a transposed convolution applies its kernel mirrored
        kernel = sum(F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1))
        return F.conv_transpose2d(hidden_states, kernel, self.conv.bias, stride=2, padding=1)


class Block2D(nn.Module):
    """Residual blocks at one resolution, each followed by attention in the attention variants.

    Args:
        widths: (in_channels, out_channels) of each residual block.
        resnet, attention: functions of (in, out) widths, and of a width (None: no attention), that make them.
    """

    gradient_checkpointing = False  # ModelMixin.enable_gradient_checkpointing() sets these two
    _gradient_checkpointing_func = None

    def __init__(self, widths: list[tuple[int, int]], resnet, attention):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList() if attention else None
        for in_channels, out_channels in widths:
            self.resnets.append(resnet(in_channels, out_channels))
            if attention:
                self.attentions.append(attention(out_channels))

    def resnet(self, i: int, hidden_states: Tensor, temb: Tensor) -> Tensor:
        block = self.resnets[i]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden_states, temb)
        return block(hidden_states, temb)

    def layer(self, i: int, hidden_states: Tensor, temb: Tensor) -> Tensor:
        hidden_states = self.resnet(i, hidden_states, temb)
        return self.attentions[i](hidden_states) if self.attentions is not None else hidden_states


class DownBlock2D(Block2D):
    """Way down at one resolution. Returns the downsampled state, and the states after each layer and the downsampling.

    The way up reads those states as skip connections.
    """

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, resnet, attention):
        super().__init__([(in_channels, out_channels)] + [(out_channels,) * 2] * (num_layers - 1), resnet, attention)
        self.downsamplers = None  # UNet2DModel adds one, except at the lowest resolution

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            hidden_states = self.layer(i, hidden_states, temb)
            skips.append(hidden_states)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class UNetMidBlock2D(Block2D):
    """Bottom of the U: residual block, attention, residual block."""

    def __init__(self, channels: int, resnet, attention):
        nn.Module.__init__(self)  # attention before residual blocks: the order of parameters in diffusers
        first = resnet(channels, channels)
        self.attentions = nn.ModuleList([attention(channels)])
        self.resnets = nn.ModuleList([first, resnet(channels, channels)])

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.resnet(1, self.layer(0, hidden_states, temb), temb)


class UpBlock2D(Block2D):
    """Way up at one resolution: each residual block reads the state and a skip connection, the latest first.

    The two are concatenated along the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int, num_layers: int, resnet, attention):
        states = [in_channels] + [out_channels] * (num_layers - 1)
        skips = [out_channels] * (num_layers - 1) + [skip_channels]  # the last skip comes from the level above
        super().__init__([(state + skip, out_channels) for state, skip in zip(states, skips)], resnet, attention)
        self.upsamplers = None  # UNet2DModel adds one, except at the highest resolution

    def forward(self, hidden_states: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            hidden_states = self.layer(i, torch.cat([hidden_states, skips.pop()], dim=1), temb)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states)


class UNet2DModel(diffusers.UNet2DModel):
    """The U-Net of DDPM, with the arguments of `diffusers.UNet2DModel`, whose documentation describes all of them.

    Args:
        block_out_channels: the width (number of channels) at each resolution, the finest first.
        layers_per_block: residual blocks at each resolution on the way down; one more on the way up.
        down_block_types: "DownBlock2D", or "AttnDownBlock2D" with attention, for each resolution.
        up_block_types: "UpBlock2D" or "AttnUpBlock2D", the coarsest resolution first.
        attention_head_dim: the width of an attention head; None: one head as wide as the level.
        norm_num_groups: groups of the group norms; must divide every width.
        num_class_embeds: the number of class labels; None: unconditional.

    Raises:
        ValueError: an option does not fit the others; the message names it.
        TypeError: there is no option of that name.
    """

    @register_to_config
    @wraps(diffusers.UNet2DModel.__init__)  # its signature is the list of options and their defaults
    def __init__(self, *args, **kwargs):
        signature(diffusers.UNet2DModel).bind(*args, **kwargs)  # TypeError: there is no such option
        config = self.config  # all options, by name
        check_options(config)
        self.usual = is_usual(config)
        if not self.usual:
            super().__init__(*args, **kwargs)
            return
        ModelMixin.__init__(self)  # and not that of stock, which would build its own blocks
        self.sample_size = config.sample_size
        self.to_json_string()  # adds class and version to the config now: added later, torch.compile would recompile
        widths, layers = config.block_out_channels, config.layers_per_block
        temb_channels = config.time_embedding_dim or 4 * widths[0]
        norm = partial(nn.GroupNorm, config.norm_num_groups, eps=config.norm_eps)
        resnet = partial(
            ResnetBlock2D, temb_channels=temb_channels, norm=norm, dropout=config.dropout, act_fn=config.act_fn
        )
        attention = partial(Attention, head_dim=config.attention_head_dim, norm=norm)

        # input, time (Vaswani et al. 2017, section 3.5, and a perceptron with one hidden layer) and class
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], temb_channels)
        classes = config.num_class_embeds
        self.class_embedding = nn.Embedding(classes, temb_channels) if classes is not None else None

        # down
        self.down_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.down_block_types):
            attn = attention if block_type == "AttnDownBlock2D" else None
            block = DownBlock2D(widths[max(i - 1, 0)], widths[i], layers, resnet, attn)
            if i < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample2D(widths[i], config.downsample_padding)])
            self.down_blocks.append(block)

        # mid
        self.mid_block = UNetMidBlock2D(widths[-1], resnet, attention)

        # up, from the coarsest resolution
        self.up_blocks = nn.ModuleList()
        for i, block_type in zip(reversed(range(len(widths))), config.up_block_types):
            attn = attention if block_type == "AttnUpBlock2D" else None
            below, above = widths[min(i + 1, len(widths) - 1)], widths[max(i - 1, 0)]
            block = UpBlock2D(below, widths[i], above, layers + 1, resnet, attn)
            if i > 0:
                block.upsamplers = nn.ModuleList([Upsample2D(widths[i])])
            self.up_blocks.append(block)

        # output
        self.conv_norm_out = norm(widths[0])
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from a batch of noisy images.

        Args:
            sample: x_t, `[B, in_channels, H, W]`, in the dtype of the weights.
            timestep: t, 0 <= t < T: one for the batch (a number, a 0-d or a `[1]` tensor) or one per image (`[B]`).
            class_labels: `[B]`, int64; required with `num_class_embeds`, an error without it.
            return_dict: False for a plain tuple.

        Returns:
            `UNet2DOutput` whose `sample` is `[B, out_channels, H, W]`.

        Raises:
            ValueError: class labels are missing, or given to a model without classes.
        """
        if not self.usual:
            return super().forward(sample, timestep, class_labels, return_dict)

        # 1. time, and class
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, dtype=torch.long)
        timesteps = timestep.to(sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels must be given: this U-Net has num_class_embeds")
            temb = temb + self.class_embedding(class_labels).to(self.dtype)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this U-Net has no num_class_embeds")

        # 2. down, keeping every state for the way up; convolutions are fastest in channels_last memory
        sample = self.conv_in(sample).contiguous(memory_format=torch.channels_last)
        skips = [sample]
        for block in self.down_blocks:
            sample, new_skips = block(sample, temb)
            skips += new_skips

        # 3. bottom and up
        sample = self.mid_block(sample, temb)
        for block in self.up_blocks:
            sample = block(sample, skips, temb)

        # 4. output
        sample = self.conv_out(self.conv_act(normalize(self.conv_norm_out, sample)))
        return UNet2DOutput(sample=sample) if return_dict else (sample,)


def is_usual(config: dict) -> bool:
    """Whether a network is written out in this file. diffusers' code builds, or refuses, all others."""
    down, up = config["down_block_types"], config["up_block_types"]
    return (
        all(config[name] == value for name, value in USUAL.items())
        and set(down) <= {"DownBlock2D", "AttnDownBlock2D"}
        and set(up) <= {"UpBlock2D", "AttnUpBlock2D"}
        and len(down) == len(up) == len(config["block_out_channels"])
        and config["layers_per_block"] > 0
    )


def check_options(config: dict) -> None:
    """Raise a ValueError for options that diffusers silently accepts, or PyTorch rejects without naming them."""
    widths = config["block_out_channels"]
    for name, divided in (("norm_num_groups", widths), ("attn_norm_num_groups", widths[-1:])):
        groups = config[name]
        if groups is not None and (groups < 1 or any(width % groups for width in divided)):
            raise ValueError(f"{name}={groups!r} must divide all of {list(divided)}, from block_out_channels")
