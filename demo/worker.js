// Draws off the page's thread, so that the page never freezes. One drawing at a time: a new one ends the one before.
// In: {load: address of the model}, {draw: a job}, or {stop: true}. Out: {report}, {ready}, {frame}, {done} or {failed}.
import { loadModel } from "./model.js";
import { addNoise, denoise, guided, noiseSource, Spread, visitedTimesteps } from "./sampler.js";

let model = null;
let newest = 0; // the number of the newest job; a job that is not the newest ends after its step
let before = Promise.resolve(); // the session takes one run at a time

onmessage = ({ data }) => {
  newest += 1;
  const mine = newest;
  if (data.load) before = load(data.load);
  if (data.draw) before = before.then(() => draw(data.draw, mine));
};

async function load(base) {
  try {
    model = await loadModel(base, (report) => postMessage({ report }));
    const { unet, ...ready } = model; // a function cannot be sent
    postMessage({ ready });
  } catch (error) {
    postMessage({ failed: error.message });
  }
}

// job: {id, sampler, steps, seed, count, labels, scale}; to start from a drawing, also {x_0: [C, H, W], until: t}.
async function draw(job, mine) {
  try {
    if (model && mine === newest) await run(job, () => mine !== newest);
  } catch (error) {
    postMessage({ id: job.id, failed: error.message });
  }
}

async function run(job, stopped) {
  const { config, alphasCumprod, shape, nullLabel, unet } = model;
  const size = shape[0] * shape[1] * shape[2];
  const numbers = Array.from({ length: job.count }, (_, i) => i);
  const nextNoise = noiseSource(job.seed, numbers, size);
  let sample = nextNoise();
  const visited = visitedTimesteps(config, job.steps);
  const start = job.x_0 ? visited.find((t) => t <= job.until) ?? visited[visited.length - 1] : visited[0];
  if (job.x_0) {
    const repeated = sample.map((_, i) => job.x_0[i % size]);
    sample = addNoise(repeated, sample, alphasCumprod[start]);
  }
  const predict = guided(unet, { alphasCumprod, labels: job.labels, scale: job.scale, nullLabel });
  const spread = new Spread(visited.filter((t) => t <= start).length, size);
  const send = (t, x_t, x_0, more) => {
    postMessage({ id: job.id, frame: { t, x_t: toBytes(x_t), x_0: x_0 && toBytes(x_0), ...more } });
  };

  send(start, sample, null, { left: Math.sqrt(alphasCumprod[start]) }); // at once: the noise that it starts from
  const begun = performance.now();
  for await (const step of denoise({ config, sampler: job.sampler, steps: job.steps, predict, sample, nextNoise, start })) {
    if (stopped()) return;
    send(step.t, step.sample, step.x_0, { left: Math.sqrt(alphasCumprod[step.t]), spread: spread.add(step.x_0) });
    if (step.last) send(-1, sample, step.previous, { left: 1, spread: spread.values });
    await new Promise((resolve) => setTimeout(resolve)); // lets a message in
  }
  postMessage({ id: job.id, done: performance.now() - begun });
}

// [-1, 1], clamped to it -> 0 ... 255, rounded.
function toBytes(images) {
  return Uint8ClampedArray.from(images, (value) => (value + 1) * 127.5);
}
