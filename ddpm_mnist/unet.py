"""The network of DDPM, epsilon_theta(x_t, t), or v: a U-Net from a noisy image and its timestep to an image.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), section 4 and appendix B: residual blocks with group normalisation,
self-attention at low resolution, and a sinusoidal embedding of the timestep, which enters every residual block. All
timesteps share the weights.

`UNet2DModel` is a drop-in replacement for `diffusers.UNet2DModel`: it has the same arguments, config keys, parameter
names and numbers, so each reads state dicts and folders that the other wrote. Options of stock that this file does not
cover raise a ValueError that names the option. One addition: sizes that do not halve evenly (28 -> 14 -> 7 -> 4) work
here, since upsampling returns to the size of the skip connection. Training refuses them: diffusers cannot run them.

It is faster than stock, with the same numbers up to rounding, through channels_last memory, `normalize`, `attend`,
`upsample_conv`, and one matrix product for the time projections of all residual blocks. Each place says why.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}
CHOICES = {  # what this file covers
    "time_embedding_type": ("positional", "fourier"),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "act_fn": tuple(ACTIVATIONS),
}


class Timesteps(nn.Module):
    """Sinusoidal position embedding of t (Vaswani et al. 2017, section 3.5): `[B] -> [B, dim]`, always in float32."""

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(exponent / (half - self.freq_shift))
        angles = timesteps[:, None].float() * frequencies[None, :]
        pair = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return F.pad(torch.cat(pair, dim=-1), (0, self.dim % 2))  # an odd width gets one zero


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding: `[B, in_channels] -> [B, time_embed_dim]`."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sample)))


def rescale(hidden_states: Tensor, factor: float) -> Tensor:
    """hidden_states / factor; skips the pass over memory where factor is 1, the usual case."""
    return hidden_states if factor == 1 else hidden_states / factor


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


def upsample_conv(conv: nn.Conv2d, hidden_states: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Repeat pixels up to `output_size`, then convolve 3x3: `[B, C, H, W] -> [B, C', *output_size]`.

    Doubling repeats each pixel in a 2x2 square, so several of the nine weights at an output pixel multiply the same
    input pixel. Adding those weights first gives a transposed convolution with stride 2 and a 4x4 kernel (the 3x3
    kernel convolved with a 2x2 kernel of ones): four products a pixel instead of nine. This is faster in float32 on a
    CPU, where products dominate the time.
    """
    height, width = hidden_states.shape[-2:]
    doubles = tuple(output_size) == (2 * height, 2 * width)
    half_precision = hidden_states.dtype.itemsize <= 2 or torch.is_autocast_enabled(hidden_states.device.type)
    if hidden_states.device.type != "cpu" or half_precision or not doubles:
        return conv(F.interpolate(hidden_states, output_size, mode="nearest"))
    flipped = conv.weight.flip(2, 3).transpose(0, 1)  # a transposed convolution applies its kernel mirrored
    kernel = sum(F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1))
    return F.conv_transpose2d(hidden_states, kernel, conv.bias, stride=2, padding=1)


class ResnetBlock2D(nn.Module):
    """Residual block: x + conv(silu(norm(conv(silu(norm(x))) + time))).

    Maps `[B, in_channels, H, W]` and the block's entry of `UNet2DModel.time_projections`, `[B, out_channels, 1, 1]`, to
    `[B, out_channels, H', W']`. `down` halves the resolution and `up` doubles it. With `time_scale_shift` the time
    scales and shifts the output of the second norm (Dhariwal & Nichol 2021, eq. 7) instead of being added before it;
    the entry is then `[B, 2 * out_channels, 1, 1]`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        act_fn: str,
        time_scale_shift: bool,
        output_scale_factor: float = 1.0,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.time_scale_shift, self.output_scale_factor = time_scale_shift, output_scale_factor
        self.down, self.up = down, up
        self.time_index = 0  # set by UNet2DModel
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if time_scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = ACTIVATIONS[act_fn]()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, time: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        residual = hidden_states
        hidden_states = self.nonlinearity(normalize(self.norm1, hidden_states))
        if self.down:
            residual, hidden_states = F.avg_pool2d(residual, 2), F.avg_pool2d(hidden_states, 2)
        elif self.up:
            residual = F.interpolate(residual, output_size, mode="nearest")
            hidden_states = F.interpolate(hidden_states, output_size, mode="nearest")
        hidden_states = self.conv1(hidden_states)

        if self.time_scale_shift:
            scale, shift = time.chunk(2, dim=1)
            hidden_states = normalize(self.norm2, hidden_states) * (1 + scale) + shift
        else:
            hidden_states = normalize(self.norm2, hidden_states + time)

        hidden_states = self.conv2(self.dropout(self.nonlinearity(hidden_states)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return rescale(residual + hidden_states, self.output_scale_factor)


class Attention(nn.Module):
    """Self-attention between all pixels, with a residual connection: `[B, C, H, W] -> [B, C, H, W]`."""

    _from_deprecated_attn_block = True  # lets ModelMixin rename the keys of checkpoints from before diffusers 0.15

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, output_scale_factor: float = 1.0):
        super().__init__()
        self.heads, self.output_scale_factor = channels // head_dim, output_scale_factor
        inner_dim = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner_dim)
        self.to_k = nn.Linear(channels, inner_dim)
        self.to_v = nn.Linear(channels, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, channels), nn.Dropout(0.0)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        if self.group_norm is not None:
            hidden_states = normalize(self.group_norm, hidden_states)
        tokens = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, C]; no copy from channels_last memory
        query, key, value = (  # each [B, heads, HW, head_dim]
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        tokens = self.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))
        hidden_states = tokens.unflatten(1, residual.shape[-2:]).permute(0, 3, 1, 2)
        return rescale(hidden_states + residual, self.output_scale_factor)


class Downsample2D(nn.Module):
    """Halve the resolution with a strided convolution: `[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]`."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.padding == 0:  # as in the original TensorFlow code: pad on the right and at the bottom only
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Enlarge to `output_size` and convolve, by `upsample_conv`: `[B, C, H, W] -> [B, C, *output_size]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int]) -> Tensor:
        return upsample_conv(self.conv, hidden_states, output_size)


class Block2D(nn.Module):
    """Residual blocks at one resolution, each followed by attention in the attention variants.

    `times` holds the projected time embedding of every residual block of the network; `time_index` finds a block's own.

    Args:
        widths: (in_channels, out_channels) of each residual block.
        resnet, attention: make a residual block, and an attention (None: no attention) of a width.
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

    def resnet(self, i: int, hidden_states: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        block = self.resnets[i]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden_states, times[block.time_index])
        return block(hidden_states, times[block.time_index])

    def layer(self, i: int, hidden_states: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        hidden_states = self.resnet(i, hidden_states, times)
        return self.attentions[i](hidden_states) if self.attentions is not None else hidden_states

    def resample(self, module: nn.Module, hidden_states: Tensor, times: tuple[Tensor, ...], **output_size) -> Tensor:
        """Change the resolution by a convolution, or by a residual block, which reads the time too."""
        time = (times[module.time_index],) if isinstance(module, ResnetBlock2D) else ()
        return module(hidden_states, *time, **output_size)


class DownBlock2D(Block2D):
    """Way down at one resolution. Returns the downsampled state, and the states after each layer and the downsampling.

    The way up reads those states as skip connections.
    """

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, resnet, attention):
        super().__init__([(in_channels, out_channels)] + [(out_channels,) * 2] * (num_layers - 1), resnet, attention)
        self.downsamplers = None  # UNet2DModel adds one, except at the lowest resolution

    def forward(self, hidden_states: Tensor, times: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            hidden_states = self.layer(i, hidden_states, times)
            skips.append(hidden_states)
        if self.downsamplers is not None:
            hidden_states = self.resample(self.downsamplers[0], hidden_states, times)
            skips.append(hidden_states)
        return hidden_states, skips


class UNetMidBlock2D(Block2D):
    """Bottom of the U: residual block, attention (unless `add_attention` is off), residual block."""

    def __init__(self, channels: int, resnet, attention):
        nn.Module.__init__(self)  # attention before residual blocks: the order of parameters in diffusers
        first = resnet(channels, channels)
        self.attentions = nn.ModuleList([attention(channels)]) if attention else None
        self.resnets = nn.ModuleList([first, resnet(channels, channels)])

    def forward(self, hidden_states: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        return self.resnet(1, self.layer(0, hidden_states, times), times)


class UpBlock2D(Block2D):
    """Way up at one resolution: each residual block reads the state and a skip connection, the latest first.

    The two are concatenated along the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int, num_layers: int, resnet, attention):
        states = [in_channels] + [out_channels] * (num_layers - 1)
        skips = [out_channels] * (num_layers - 1) + [skip_channels]  # the last skip comes from the level above
        super().__init__([(state + skip, out_channels) for state, skip in zip(states, skips)], resnet, attention)
        self.upsamplers = None  # UNet2DModel adds one, except at the highest resolution

    def forward(self, hidden_states: Tensor, skips: list[Tensor], times: tuple[Tensor, ...]) -> Tensor:
        for i in range(len(self.resnets)):
            hidden_states = self.layer(i, torch.cat([hidden_states, skips.pop()], dim=1), times)
        if self.upsamplers is not None:
            size = skips[-1].shape[-2:]
            hidden_states = self.resample(self.upsamplers[0], hidden_states, times, output_size=size)
        return hidden_states


class UNet2DModel(ModelMixin, ConfigMixin):
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
        ValueError: an option is not covered or does not fit the others; the message names it.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        super().__init__()
        check_options(self.config)
        self.sample_size = sample_size
        self.to_json_string()  # adds class and version to the config now: added later, torch.compile would recompile
        width = block_out_channels[0]
        temb_channels = time_embedding_dim or 4 * width
        scale_shift = resnet_time_scale_shift == "scale_shift"

        def resnet(in_channels: int, out_channels: int, **kwargs) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels,
                out_channels,
                temb_channels,
                groups=norm_num_groups,
                eps=norm_eps,
                dropout=dropout,
                act_fn=act_fn.lower(),
                time_scale_shift=scale_shift,
                **kwargs,
            )

        def attention(channels: int, groups: int | None = norm_num_groups, **kwargs) -> Attention:
            return Attention(channels, attention_head_dim or channels, groups, norm_eps, **kwargs)

        # input and time
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        if time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(width, scale=16)
            self.time_embedding = TimestepEmbedding(2 * width, temb_channels)
        else:
            self.time_proj = Timesteps(width, flip_sin_to_cos, freq_shift)
            self.time_embedding = TimestepEmbedding(width, temb_channels)
        self.class_embedding = nn.Embedding(num_class_embeds, temb_channels) if num_class_embeds is not None else None

        # down; as in stock, only blocks with attention resample with residual blocks ("resnet")
        self.down_blocks = nn.ModuleList()
        levels = len(block_out_channels)
        for i, (block_type, out) in enumerate(zip(down_block_types, block_out_channels)):
            attn = attention if block_type == "AttnDownBlock2D" else None
            block = DownBlock2D(block_out_channels[max(i - 1, 0)], out, layers_per_block, resnet, attn)
            if i < levels - 1:
                by_resnet = attn and downsample_type == "resnet"
                down = resnet(out, out, down=True) if by_resnet else Downsample2D(out, downsample_padding)
                block.downsamplers = nn.ModuleList([down])
            self.down_blocks.append(block)

        # mid; its attention has a norm unless the time scales and shifts
        self.mid_block = None
        if mid_block_type is not None:
            groups = attn_norm_num_groups or (None if scale_shift else norm_num_groups)
            mid_resnet = partial(resnet, output_scale_factor=mid_block_scale_factor)
            mid_attention = partial(attention, groups=groups, output_scale_factor=mid_block_scale_factor)
            self.mid_block = UNetMidBlock2D(
                block_out_channels[-1], mid_resnet, mid_attention if add_attention else None
            )

        # up
        self.up_blocks = nn.ModuleList()
        widths = block_out_channels[::-1]
        for i, (block_type, out) in enumerate(zip(up_block_types, widths)):
            attn = attention if block_type == "AttnUpBlock2D" else None
            skip = widths[min(i + 1, levels - 1)]
            block = UpBlock2D(widths[max(i - 1, 0)], out, skip, layers_per_block + 1, resnet, attn)
            if i < levels - 1:
                by_resnet = attn and upsample_type == "resnet"
                block.upsamplers = nn.ModuleList([resnet(out, out, up=True) if by_resnet else Upsample2D(out)])
            self.up_blocks.append(block)

        # output
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        for index, block in enumerate(self.resnet_blocks()):
            block.time_index = index

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
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

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

        times = self.time_projections(temb)

        # 2. down, keeping every state for the way up; convolutions are fastest in channels_last memory
        sample = self.conv_in(sample).contiguous(memory_format=torch.channels_last)
        skips = [sample]
        for block in self.down_blocks:
            sample, new_skips = block(sample, times)
            skips += new_skips

        # 3. bottom and up
        if self.mid_block is not None:
            sample = self.mid_block(sample, times)
        for block in self.up_blocks:
            sample = block(sample, skips, times)

        # 4. output
        sample = self.conv_out(self.conv_act(normalize(self.conv_norm_out, sample)))
        if self.config.time_embedding_type == "fourier":
            sample = sample / timesteps[:, None, None, None]
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def resnet_blocks(self) -> list[ResnetBlock2D]:
        """All residual blocks, in a fixed order."""
        return [module for module in self.modules() if isinstance(module, ResnetBlock2D)]

    def time_projections(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Project the time embedding for every residual block, in one matrix product.

        `[B, temb_channels]` -> for each block, in the order of `time_index`, `[B, out_channels, 1, 1]` (twice as wide
        with "scale_shift"): one value per channel, the same at every pixel.
        """
        blocks = self.resnet_blocks()
        weight = torch.cat([block.time_emb_proj.weight for block in blocks])
        bias = torch.cat([block.time_emb_proj.bias for block in blocks])
        together = F.linear(blocks[0].nonlinearity(temb), weight, bias)[:, :, None, None]
        return together.split([len(block.time_emb_proj.bias) for block in blocks], dim=1)


def check_options(config: dict) -> None:
    """Check a U-Net config. Raises a ValueError that names the first option that is not covered or does not fit."""
    channels, groups, head_dim = (config[k] for k in ("block_out_channels", "norm_num_groups", "attention_head_dim"))
    for name, allowed in CHOICES.items():
        values = config[name] if name.endswith("_block_types") else [config[name]]
        for value in values:
            if value not in allowed and str(value).lower() not in allowed:
                raise ValueError(f"{name}={value!r} is not covered; choose from {', '.join(map(str, allowed))}")
        if name.endswith("_block_types") and len(values) != len(channels):
            raise ValueError(f"{name} has {len(values)} entries, block_out_channels {len(channels)}: make them equal")
    for name in ("in_channels", "out_channels", "layers_per_block"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]!r} must be at least 1")
    if not groups or any(width % groups for width in channels):
        raise ValueError(f"norm_num_groups={groups!r} must divide every one of block_out_channels={list(channels)}")
    attn_groups = config["attn_norm_num_groups"]
    if attn_groups is not None and (attn_groups < 1 or channels[-1] % attn_groups):
        raise ValueError(
            f"attn_norm_num_groups={attn_groups!r} must divide the last of block_out_channels={channels[-1]}"
        )
    levels = [*zip(channels, config["down_block_types"]), *zip(channels[::-1], config["up_block_types"])]
    attended = [width for width, block_type in levels if block_type.startswith("Attn")]
    if config["mid_block_type"] and config["add_attention"]:
        attended.append(channels[-1])
    if head_dim is not None and attended and not 1 <= head_dim <= min(attended):
        raise ValueError(
            f"attention_head_dim={head_dim!r} must lie between 1 and the width of the attention, {min(attended)}"
        )
