// q(x_t | x_0), live: x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) epsilon, eq. 4 of Ho et al. 2020.
import { put } from "./film.js";
import { addNoise, noiseSource } from "./sampler.js";

export class Schedule {
  constructor(root, { alphasCumprod, shape }) {
    Object.assign(this, { root, alphasCumprod, shape, image: null });
    const size = shape[0] * shape[1] * shape[2];
    this.noise = noiseSource(0, [0], size)(); // epsilon ~ N(0, I), the same for every t
    this.slider = root.querySelector("input");
    const T = alphasCumprod.length;
    Object.assign(this.slider, { max: T - 1, value: Math.round(T / 4), oninput: () => this.show() });
    Object.assign(root.querySelector("canvas"), { width: shape[2], height: shape[1] });
    this.drawPlot(root.querySelector("svg"));
    this.show();
  }

  // The first of these images, bytes of [B, C, H, W], becomes x_0.
  take(images) {
    this.image = Float32Array.from(images.subarray(0, this.noise.length), (byte) => byte / 127.5 - 1);
    this.show();
  }

  show() {
    const t = Number(this.slider.value);
    const alphaProd = this.alphasCumprod[t];
    const find = (name) => this.root.querySelector(name);
    find("output").textContent = t;
    find(".sum").textContent = `xₜ = ${Math.sqrt(alphaProd).toFixed(3)} x₀ + ${Math.sqrt(1 - alphaProd).toFixed(3)} ε`;
    const [ratio, percent] = [alphaProd / (1 - alphaProd), 100 * alphaProd];
    find(".words").textContent =
      `If x₀ has variance 1, ${percent.toFixed(percent < 1 ? 3 : 1)}% of that of xₜ is signal, and the rest noise: ` +
      `a signal-to-noise ratio of ${ratio > 100 || ratio < 0.01 ? ratio.toExponential(1) : ratio.toFixed(2)}.`;
    find(".now").setAttribute("transform", `translate(${this.x(t)} 0)`);
    const x_t = addNoise(this.image ?? this.noise.map(() => -1), this.noise, alphaProd);
    put(find("canvas"), Uint8ClampedArray.from(x_t, (value) => (value + 1) * 127.5), 0, this.shape);
  }

  x(t) {
    return 30 + (280 * t) / (this.alphasCumprod.length - 1);
  }

  drawPlot(plot) {
    const y = (value) => 180 - 165 * value;
    const curve = (values) => values.map((value, t) => `${this.x(t).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    plot.innerHTML = // of numbers only
      `<path class="axes" d="M30 ${y(1)} V180 H310"/>` +
      [0, 0.5, 1].map((value) => `<text x="25" y="${y(value) + 4}" text-anchor="end">${value}</text>`).join("") +
      `<text x="30" y="196">0</text><text x="310" y="196" text-anchor="end">t = ${this.alphasCumprod.length - 1}</text>` +
      `<polyline class="signal" points="${curve(this.alphasCumprod.map(Math.sqrt))}"/>` +
      `<polyline class="noise" points="${curve(this.alphasCumprod.map((a) => Math.sqrt(1 - a)))}"/>` +
      `<path class="now" d="M0 ${y(1)} V180"/>`;
  }
}
