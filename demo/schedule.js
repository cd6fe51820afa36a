// q(x_t | x_0), live: x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) epsilon, eq. 4 of Ho et al. 2020.
// props.value: {alphas_cumprod}. x_0 is the first image of the last drawing.
const find = (name) => element.querySelector(name);
const [slider, canvas, plot] = ["input", "canvas", "svg"].map(find);
const { alphas_cumprod } = props.value;
const T = alphas_cumprod.length;
let image = null; // ImageData of x_0
let noise = []; // epsilon ~ N(0, I), the same for every t

function gauss() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function show() {
  const t = Number(slider.value);
  const [signal, sigma] = [Math.sqrt(alphas_cumprod[t]), Math.sqrt(1 - alphas_cumprod[t])];
  find("output").textContent = t;
  find(".sum").textContent = `xₜ = ${signal.toFixed(3)} x₀ + ${sigma.toFixed(3)} ε`;
  const ratio = alphas_cumprod[t] / (1 - alphas_cumprod[t]);
  const percent = 100 * alphas_cumprod[t];
  find(".words").textContent =
    `Of the variance of xₜ, ${percent.toFixed(percent < 1 ? 3 : 1)}% is the image's, and the rest is noise: ` +
    `a signal-to-noise ratio of ${ratio > 100 || ratio < 0.01 ? ratio.toExponential(1) : ratio.toFixed(2)}.`;
  find(".now").setAttribute("transform", `translate(${x(t)} 0)`);
  if (!image) return;
  const out = new ImageData(image.width, image.height);
  for (let i = 0; i < out.data.length; i++) {
    const value = signal * (image.data[i] / 127.5 - 1) + sigma * noise[i];
    out.data[i] = i % 4 === 3 ? 255 : (Math.max(-1, Math.min(1, value)) + 1) * 127.5;
  }
  canvas.getContext("2d").putImageData(out, 0, 0);
}

const x = (t) => 30 + (280 * t) / (T - 1);
const y = (value) => 180 - 165 * value;
function drawPlot() {
  const curve = (values) => values.map((value, t) => `${x(t).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  plot.innerHTML =
    `<path class="axes" d="M30 ${y(1)} V180 H310"/>` +
    [0, 0.5, 1].map((value) => `<text x="25" y="${y(value) + 4}" text-anchor="end">${value}</text>`).join("") +
    `<text x="30" y="196">0</text><text x="310" y="196" text-anchor="end">t = ${T - 1}</text>` +
    `<polyline class="signal" points="${curve(alphas_cumprod.map(Math.sqrt))}"/>` +
    `<polyline class="noise" points="${curve(alphas_cumprod.map((a) => Math.sqrt(1 - a)))}"/>` +
    `<g class="now"><path d="M0 ${y(1)} V180"/></g>`;
}

function take({ frames, width, height }) {
  const picture = new Image();
  picture.onload = () => {
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, width, 0, width, height, 0, 0, width, height);
    image = context.getImageData(0, 0, width, height);
    noise = Float32Array.from({ length: image.data.length }, gauss);
    const gray = image.data.every((value, i) => i % 4 === 3 || value === image.data[i - (i % 4)]);
    if (gray) noise.forEach((_, i) => (noise[i] = noise[i - (i % 4)])); // a gray image stays gray
    show();
  };
  picture.src = frames[frames.length - 1].png;
}

slider.max = T - 1;
slider.value = Math.round(T / 4);
drawPlot();
show();
slider.oninput = show;
addEventListener("drawn", ({ detail }) => take(detail));
if (window.lastDrawn) take(window.lastDrawn);
