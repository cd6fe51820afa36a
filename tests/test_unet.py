"""The in-repo U-Net against stock diffusers: same names, same numbers, forward and backward."""

import accelerate
import diffusers
import pytest
import torch

from ddpm_mnist import UNet2DModel

BASE = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
ALL_ATTENTION = {"down_block_types": ("AttnDownBlock2D",) * 3, "up_block_types": ("AttnUpBlock2D",) * 3}
CONFIGS = {
    "plain": {},
    "one head as wide as the level": {"attention_head_dim": None},
    "two layers, RGB, wider at the end": {"layers_per_block": 2, "block_out_channels": (8, 24, 40),
                                          "in_channels": 3, "out_channels": 3},
    "attention everywhere": ALL_ATTENTION,
    "resnet resampling": {**ALL_ATTENTION, **RESNET},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, resnet resampling, normed attention": {
        **ALL_ATTENTION,
        **RESNET,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    },
    "fourier time": {"time_embedding_type": "fourier"},
    "no mid attention, scaled mid": {"add_attention": False, "mid_block_scale_factor": 1.5},
    "scaled mid attention": {"mid_block_scale_factor": 2**0.5, "attention_head_dim": 16},
    "no mid block": {"mid_block_type": None},
    "classes": {"num_class_embeds": 10},
    "asymmetric padding, as in google/ddpm-cifar10-32": {"downsample_padding": 0, "sample_size": 32, "freq_shift": 1},
    "sin before cos, another time width": {"flip_sin_to_cos": False, "time_embedding_dim": 48},
    "gelu, epsilon, centred input": {"act_fn": "gelu", "norm_eps": 1e-6, "center_input_sample": True},
    "heads that do not divide the width": {"attention_head_dim": 12},
    "odd width": {"block_out_channels": (15, 30), "norm_num_groups": 5, "down_block_types": ("DownBlock2D",) * 2,
                  "up_block_types": ("UpBlock2D",) * 2, "act_fn": "mish"},
    "learnt variance": {"out_channels": 2, "dropout": 0.1, "act_fn": "ReLU"},
    "skip blocks, as in google/ncsnpp-celebahq-256": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 64),
        "norm_num_groups": None,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "sample_size": 32,
    },
    "resnet blocks": {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                      "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D")},
    "a learnt table of times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
}  # fmt: skip


def pair(config: dict) -> tuple[UNet2DModel, diffusers.UNet2DModel]:
    """Ours and stock's, with stock's weights in both, in eval mode."""
    torch.manual_seed(0)
    stock = diffusers.UNet2DModel(**BASE | config)
    ours = UNet2DModel(**BASE | config)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours.eval(), stock.eval()


def batch(model, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    c, size = model.config.in_channels, model.config.sample_size
    sample = torch.randn(3, c, size, size, generator=generator, dtype=dtype)
    labels = torch.tensor([3, 0, 9]) if model.config.num_class_embeds else None
    return sample, torch.tensor([1, 500, 999]), labels


def output_and_gradients(model, dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In `dtype`, on the same float32 numbers; returned in float64."""
    model = model.to(dtype)
    sample, timesteps, labels = batch(model, torch.float32)
    sample = sample.to(dtype).requires_grad_()
    output = model(sample, timesteps, class_labels=labels).sample
    output.square().mean().backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return output.double(), gradients | {"x": sample.grad.double()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_output_and_gradients_equal_stock(name, dtype, tolerance):
    """Against stock in float64: in float32 stock itself is off by up to 2.5e-5 on some CPUs ("learnt variance")."""
    ours, stock = pair(CONFIGS[name])
    output, gradients = output_and_gradients(ours, dtype)
    expected_output, expected = output_and_gradients(stock, torch.float64)
    torch.testing.assert_close(output, expected_output, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=tolerance, atol=tolerance * scale, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dicts_load_both_ways_and_configs_are_the_same(name):
    ours, stock = pair(CONFIGS[name])
    stock.load_state_dict(ours.state_dict(), strict=True)
    hidden = ("_class_name", "_diffusers_version")
    assert {k: v for k, v in ours.config.items() if k not in hidden} == {
        k: v for k, v in stock.config.items() if k not in hidden
    }


@pytest.mark.parametrize("config", [{}, RESNET], ids=["usual", "rare"])
def test_options_are_taken_as_by_stock(config):
    """By position and by name, and those not given are known as defaults; others are refused."""
    with torch.device("meta"):
        ours, stock = (cls(28, 1, 1, **config).config for cls in (UNet2DModel, diffusers.UNet2DModel))
    assert ours["sample_size"] == 28 and set(ours["_use_default_values"]) == set(stock["_use_default_values"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        UNet2DModel(layer=2, **config)
    with pytest.raises(TypeError):
        UNet2DModel(*range(99), **config)


def test_same_seed_gives_the_same_initial_weights_as_stock():
    torch.manual_seed(5)
    stock = diffusers.UNet2DModel(**BASE)
    torch.manual_seed(5)
    ours = UNet2DModel(**BASE)
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in stock.state_dict().items())


def test_folders_are_read_both_ways(tmp_path):
    ours, stock = pair({})
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert not list(tmp_path.rglob("*.bin"))
    sample, timesteps, _ = batch(ours, torch.float32)
    expected = stock(sample, timesteps).sample
    read_by_stock = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    read_by_ours = UNet2DModel.from_pretrained(tmp_path / "stock")
    assert torch.equal(read_by_stock(sample, timesteps).sample, expected)
    torch.testing.assert_close(read_by_ours(sample, timesteps).sample, expected, rtol=1e-5, atol=1e-5)


def lora(unet):
    peft = pytest.importorskip("peft")  # not needed by anything else here
    names = ["time_emb_proj", "conv", "to_q"]
    return peft.get_peft_model(unet, peft.LoraConfig(target_modules=names, init_lora_weights=False)).base_model.model


def hooked(unet):
    for name, module in unet.named_modules():
        if name.endswith(("time_emb_proj", "upsamplers.0.conv")):
            module.register_forward_hook(lambda module, arguments, output: 2 * output)
    return unet


def float8(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return unet


TOOLS = {
    "LoRA": lora,
    "hooks": hooked,
    "float8 in memory": float8,
    "offload": lambda unet: accelerate.cpu_offload(unet, torch.device("cpu")),
    "int8": lambda unet: torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_change_layers_work_as_on_stock(tool):
    ours, stock = (TOOLS[tool](unet) for unet in pair({}))
    if tool == "LoRA":
        ours.load_state_dict(stock.state_dict(), strict=True)  # its matrices are random
    sample, timesteps = torch.randn(2, 1, 28, 28), torch.tensor([0, 500])
    outputs = [unet(sample, timesteps).sample for unet in (ours, stock)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    untouched = pair({})[0](sample, timesteps).sample
    assert tool == "offload" or (outputs[0] - untouched).abs().max() > 1e-3  # the tool has an effect
    if tool == "LoRA":
        for output in outputs:
            output.square().mean().backward()
        grads = [{n: p.grad for n, p in unet.named_parameters() if "lora" in n} for unet in (ours, stock)]
        assert len(grads[0]) > 10 and grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


def test_timestep_may_be_a_number_a_scalar_or_a_batch():
    ours, stock = pair({})
    sample, _, _ = batch(ours, torch.float32)
    expected = stock(sample, 7).sample
    for timestep in (7, 7.9, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])):
        torch.testing.assert_close(ours(sample, timestep, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_computes_twice_and_changes_no_numbers():
    ours, _ = pair({"layers_per_block": 2})
    sample, timesteps, _ = batch(ours, torch.float32)
    calls, gradients = [], []
    ours.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        ours.zero_grad()
        ours(sample, timesteps).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
        ours.enable_gradient_checkpointing()
    assert all(block.gradient_checkpointing for block in (*ours.down_blocks, ours.mid_block, *ours.up_blocks))
    torch.testing.assert_close(*gradients)
    assert len(calls) == 1 + 2


def test_dropout_is_active_in_training_only():
    ours, _ = pair({"dropout": 0.5})
    sample, timesteps, _ = batch(ours, torch.float32)
    assert torch.equal(ours(sample, timesteps).sample, ours(sample, timesteps).sample)
    ours.train()
    assert not torch.equal(ours(sample, timesteps).sample, ours(sample, timesteps).sample)


def run(model, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and all gradients in one vector, of a fixed batch."""
    sample, timesteps, _ = batch(model, torch.float32)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(sample, timesteps).sample.float()
    output.square().mean().backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters()}  # stock has another order
    return output.detach(), torch.cat([gradients[name] for name in sorted(gradients)])


@pytest.mark.parametrize("name", ["plain", "one head as wide as the level", "attention everywhere", "scale and shift"])
def test_bf16_autocast_is_as_near_to_float32_as_stock_is(name):
    ours, stock = pair(CONFIGS[name])
    for exact, mine, theirs in zip(run(stock, False), run(ours, True), run(stock, True)):
        assert 0 < (mine - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_it_compiles_whole_and_once():
    """torch.compile finds no graph break, and neither other timesteps nor another batch of the size compile again."""
    ours, _ = pair({"attention_head_dim": None})
    torch._dynamo.reset()  # what other tests have compiled
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected = run(ours, True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            sample, timesteps = torch.randn(3, 1, 28, 28, generator=generator), torch.tensor([step, 10 * step, 999])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                compiled(sample, timesteps).sample.mean().backward()
        for mine, eager in zip(run(compiled, True), expected):
            torch.testing.assert_close(mine, eager, rtol=0.02, atol=0.02 * eager.abs().max().item())


def test_class_labels_are_asked_for_and_refused():
    ours, _ = pair({"num_class_embeds": 10})
    with pytest.raises(ValueError, match="class_labels must be given"):
        ours(torch.randn(1, 1, 28, 28), 0)
    ours, _ = pair({})
    with pytest.raises(ValueError, match="num_class_embeds"):
        ours(torch.randn(1, 1, 28, 28), 0, class_labels=torch.tensor([1]))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("up_block_types", ("UpBlock2D",) * 2),
        ("norm_num_groups", 5),
        ("norm_num_groups", 0),
        ("attn_norm_num_groups", 7),
        ("attention_head_dim", 64),
        ("attention_head_dim", 0),
    ],
)
def test_what_does_not_fit_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        UNet2DModel(**BASE | {option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_embedding_type", "unknown"),
        ("resnet_time_scale_shift", "spatial"),
        ("act_fn", "tanh"),
        ("down_block_types", ("UpBlock2D",) * 3),
        ("up_block_types", ("CrossAttnUpBlock2D",) * 3),
        ("block_out_channels", (16, 32)),
        ("norm_num_groups", None),
    ],
)
def test_what_stock_refuses_is_refused_in_its_words(option, value):
    with pytest.raises(Exception) as theirs:
        diffusers.UNet2DModel(**BASE | {option: value})
    with pytest.raises(theirs.type) as ours:
        UNet2DModel(**BASE | {option: value})
    assert str(ours.value) == str(theirs.value)


def test_checkpoints_from_before_diffusers_0_15_load(tmp_path):
    """google/ddpm-cifar10-32 and its like name the projections query, key, value and proj_attn."""
    from safetensors.torch import load_file, save_file

    ours, stock = pair({})
    stock.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(file).items():
        for new_name, old_name in old.items():
            key = key.replace(new_name, old_name)
        renamed[key] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    sample, timesteps, _ = batch(ours, torch.float32)
    read = UNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(read(sample, timesteps).sample, stock(sample, timesteps).sample, rtol=1e-5, atol=1e-5)
