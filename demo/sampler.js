// Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239): from noise to images, in discrete time t = 0 ... T-1
// (the paper's t is ours plus one). What ddpm_mnist/pipeline.py and scheduler.py do, in the browser: from the same noise
// the same images. Images are a Float32Array of [B, C, H, W], about [-1, 1].

// ---- the forward process ---------------------------------------------------------------------------------------------

// alphas_cumprod_t = product over s <= t of (1 - beta_s), [T]. `config`: scheduler_config.json, with the keys of diffusers.
export function makeAlphasCumprod(config) {
  let product = 1;
  return makeBetas(config).map((beta) => (product *= 1 - beta));
}

function makeBetas({ num_train_timesteps: T, beta_start, beta_end, beta_schedule, trained_betas }) {
  if (trained_betas) return trained_betas;
  const linspace = (from, to) => Array.from({ length: T }, (_, t) => from + ((to - from) * t) / (T - 1));
  switch (beta_schedule) {
    case "linear": // section 4: 1e-4 to 0.02
      return linspace(beta_start, beta_end);
    case "scaled_linear":
      return linspace(Math.sqrt(beta_start), Math.sqrt(beta_end)).map((root) => root ** 2);
    case "squaredcos_cap_v2": {
      const signal = (t) => Math.cos(((t / T + 0.008) / 1.008) * (Math.PI / 2)) ** 2;
      return linspace(0, T - 1).map((t) => Math.min(1 - signal(t + 1) / signal(t), 0.999));
    }
  }
}

// A setting of a scheduler's config that the functions below do not support, in words; or null.
export function unknownSetting(config) {
  const known = {
    beta_schedule: ["linear", "scaled_linear", "squaredcos_cap_v2"],
    prediction_type: ["epsilon", "sample", "v_prediction"],
    variance_type: ["fixed_small", "fixed_large"],
    timestep_spacing: ["leading", "trailing", "linspace"],
    thresholding: [false, undefined],
    rescale_betas_zero_snr: [false, undefined],
  };
  const name = Object.keys(known).find((key) => !known[key].includes(config[key]));
  return name ? `${name} is ${config[name]}` : null;
}

// x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) epsilon, eq. 4.
export function addNoise(x_0, noise, alphaProd) {
  return x_0.map((value, i) => Math.sqrt(alphaProd) * value + Math.sqrt(1 - alphaProd) * noise[i]);
}

// ---- the reverse process ---------------------------------------------------------------------------------------------

// Which t are visited in `steps` of T steps, the largest first (Lin et al. 2024, https://arxiv.org/abs/2305.08891, table 2).
// "leading" becomes "trailing" if steps do not divide T or start far from it: see with_timesteps in pipeline.py.
export function visitedTimesteps(config, steps) {
  const T = config.num_train_timesteps;
  const jump = Math.floor(T / steps);
  const leading = Array.from({ length: steps }, (_, i) => (steps - 1 - i) * jump + (config.steps_offset ?? 0));
  if (config.timestep_spacing === "linspace") {
    return leading.map((_, i) => roundHalfToEven((T - 1) * (steps === 1 ? 0 : (steps - 1 - i) / (steps - 1))));
  }
  const early = leading[0] < T - T / Math.max(steps, 4) - T / 20;
  if (config.timestep_spacing === "leading" && T % steps === 0 && !early) return leading;
  const stride = T - T / steps - T; // rounded as numpy.arange does
  return leading.map((_, i) => roundHalfToEven(T + i * stride) - 1).filter((t) => t >= 0);
}

function roundHalfToEven(x) {
  return x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

// Algorithm 2. Yields each step from x_t to x_{t-1}: {t, sample: x_t, x_0: predicted from x_t, previous: x_{t-1}, last}.
//   sampler    "ddpm", or "ddim" (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0)
//   predict    async (x_t, t) => what the U-Net outputs; see `guided`
//   sample     x_T, pure noise (line 1); or the x_t of the first visited t that is at most `start`
//   nextNoise  () => epsilon ~ N(0, I), shaped like the sample
export async function* denoise({ config, sampler, steps, predict, sample, nextNoise, start = Infinity }) {
  const alphasCumprod = makeAlphasCumprod(config);
  const visited = visitedTimesteps(config, steps);
  const timesteps = visited.filter((t) => t <= start);
  for (const [i, t] of timesteps.entries()) { // line 2
    const last = i === timesteps.length - 1;
    const previousT = last ? -1 : timesteps[i + 1];
    const alphaProd = alphasCumprod[t];
    const alphaProdPrev = previousT >= 0 ? alphasCumprod[previousT] : 1;
    const output = await predict(sample, t);
    const x_0 = predictOriginal(config, output, sample, alphaProd);
    const step = sampler === "ddim" ? ddimStep : ddpmStep;
    const previous = step({ config, steps, t, sample, x_0, output, alphaProd, alphaProdPrev, nextNoise });
    yield { t, sample, x_0, previous, last };
    sample = previous;
  }
}

// The predicted x_0: eq. 15 where the U-Net outputs epsilon, then clipped to the range of images.
function predictOriginal(config, output, sample, alphaProd) {
  const [signal, sigma] = [Math.sqrt(alphaProd), Math.sqrt(1 - alphaProd)];
  const clip = config.clip_sample ? config.clip_sample_range ?? 1 : Infinity;
  const original = {
    epsilon: (i) => (sample[i] - sigma * output[i]) / signal,
    v_prediction: (i) => signal * sample[i] - sigma * output[i], // Salimans & Ho 2022
    sample: (i) => output[i],
  }[config.prediction_type];
  return sample.map((_, i) => Math.max(-clip, Math.min(clip, original(i))));
}

// x_{t-1} ~ N(mu_t, sigma_t^2 I): the mean of q(x_{t-1} | x_t, x_0), eq. 7, and noise (lines 3 and 4).
function ddpmStep({ config, steps, t, sample, x_0, alphaProd, alphaProdPrev, nextNoise }) {
  const alpha = alphaProd / alphaProdPrev; // of the jump between the two timesteps; its beta is 1 - alpha
  const originalCoeff = (Math.sqrt(alphaProdPrev) * (1 - alpha)) / (1 - alphaProd);
  const currentCoeff = (Math.sqrt(alpha) * (1 - alphaProdPrev)) / (1 - alphaProd);
  const mean = sample.map((x_t, i) => originalCoeff * x_0[i] + currentCoeff * x_t);
  if (t === 0) return mean; // line 3: no noise at the last step
  const small = ((1 - alphaProdPrev) / (1 - alphaProd)) * (1 - alpha); // beta-tilde_t, eq. 7
  // beta_t of a jump over many timesteps would be too much noise: see make_sampler in sampling.py
  const large = config.variance_type === "fixed_large" && steps >= config.num_train_timesteps;
  const sigma = Math.sqrt(large ? 1 - alpha : Math.max(small, 1e-20));
  const noise = nextNoise();
  return mean.map((mu, i) => mu + sigma * noise[i]);
}

// The same x_0 with less of the same epsilon. If x_0 was clipped, it is the epsilon that belongs to the clipped one.
function ddimStep({ config, sample, x_0, output, alphaProd, alphaProdPrev }) {
  const [signal, sigma] = [Math.sqrt(alphaProd), Math.sqrt(1 - alphaProd)];
  const direct = config.prediction_type === "epsilon" && !config.clip_sample; // dividing by sigma would cost digits
  const epsilon = (i) => (direct ? output[i] : (sample[i] - signal * x_0[i]) / sigma);
  return sample.map((_, i) => Math.sqrt(alphaProdPrev) * x_0[i] + Math.sqrt(1 - alphaProdPrev) * epsilon(i));
}

// The U-Net as a function of x_t and t, with classifier-free guidance (Ho & Salimans 2022,
// https://arxiv.org/abs/2207.12598) where log SNR is at least `minLogSnr`: see `guided` in pipeline.py.
//   unet  async (x_t, t, labels) => its output; `labels` is an array of B numbers, or null for a U-Net without classes
export function guided(unet, { alphasCumprod, labels, scale, nullLabel, minLogSnr = -2 }) {
  return async (sample, t) => {
    const logSnr = Math.log(alphasCumprod[t] / (1 - alphasCumprod[t]));
    const w = scale > 1 && logSnr < minLogSnr ? 1 : scale;
    if (labels === null || nullLabel === null || w === 1) return unet(sample, t, labels);
    const twice = new Float32Array(2 * sample.length);
    twice.set(sample);
    twice.set(sample, sample.length);
    const both = await unet(twice, t, [...labels, ...labels.map(() => nullLabel)]);
    const without = both.subarray(sample.length);
    return both.slice(0, sample.length).map((withClass, i) => without[i] + w * (withClass - without[i]));
  };
}

// ---- how sure --------------------------------------------------------------------------------------------------------

// How much the predicted x_0 still moves: the root of its variance over the last half of `steps`, averaged over the pixels,
// in grey levels of 255. Images that fail move more (Aithal et al. 2024, https://arxiv.org/abs/2406.09358): digits
// that a classifier does not recognise moved more than others in 62 of 100 pairs; with classes and guidance, in 75.
export class Spread {
  constructor(steps, size) {
    Object.assign(this, { length: Math.max(2, Math.ceil(steps / 2)), size, last: [], values: [] });
  }

  // Takes the x_0 of one more step, and returns the spread of each image; none at the first step.
  add(x_0) {
    this.last = [...this.last, x_0].slice(-this.length);
    if (this.last.length > 1) {
      this.values = Array.from({ length: x_0.length / this.size }, (_, image) => this.of(image));
    }
    return this.values;
  }

  of(image) {
    const count = this.last.length;
    let sum = 0;
    for (let i = image * this.size; i < (image + 1) * this.size; i++) {
      const mean = this.last.reduce((total, x_0) => total + x_0[i], 0) / count;
      sum += this.last.reduce((total, x_0) => total + (x_0[i] - mean) ** 2, 0) / count;
    }
    return 127.5 * Math.sqrt(sum / this.size);
  }
}

// ---- random numbers --------------------------------------------------------------------------------------------------

// () => epsilon ~ N(0, I) for the images with these numbers, `size` values each. Image i of a seed has a stream of its
// own, so that it is the same image at every visit and in any batch. (PyTorch's streams are others.)
export function noiseSource(seed, numbers, size) {
  const streams = numbers.map((number) => normals(seed, number));
  return () => {
    const noise = new Float32Array(streams.length * size);
    return noise.map((_, i) => streams[Math.floor(i / size)]());
  };
}

// Independent normal numbers, by Box and Muller, from the generator sfc32 of Chris Doty-Humphrey's PractRand.
function normals(seed, number) {
  let [a, b, c, counter] = [seed | 0, number | 0, 0x9e3779b9 | 0, 1];
  const bits = () => {
    const sum = (((a + b) | 0) + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return sum >>> 0;
  };
  for (let i = 0; i < 16; i++) bits(); // until all bits of the seed have spread
  const uniform = () => (bits() + 0.5) / 2 ** 32;
  let spare = null;
  return () => {
    if (spare !== null) {
      const value = spare;
      spare = null;
      return value;
    }
    const [radius, angle] = [Math.sqrt(-2 * Math.log(uniform())), 2 * Math.PI * uniform()];
    spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  };
}
