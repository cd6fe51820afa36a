// A trained model in the browser: its files, and its U-Net in onnxruntime-web, which comes from a CDN. The version is
// pinned, and the browser refuses a file whose hash is not the one given here.
import { makeAlphasCumprod, unknownSetting } from "./sampler.js";

const CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";
const RUNTIMES = {
  webgpu: {
    script: ["ort.webgpu.bundle.min.mjs", "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f"],
    wasm: ["ort-wasm-simd-threaded.asyncify.wasm", "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR"],
  },
  wasm: {
    script: ["ort.wasm.bundle.min.mjs", "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG"],
    wasm: ["ort-wasm-simd-threaded.wasm", "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM"],
  },
};

// The model in a folder, at the address `base`: {unet, config, alphasCumprod, shape, classes, nullLabel, runtime}.
//   unet     async (x_t, t, labels) => its output; see `guided` in sampler.js
//   shape    [C, H, W]
//   classes  how many labels can be asked for; 0 for an unconditional model
//   runtime  what it runs on, in words
// `report` is told in words what is being loaded. An Error says what is missing.
export async function loadModel(base, report = () => {}) {
  report("Loading the model…");
  const [index, unetConfig, config, weights] = await Promise.all([
    ...["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"].map((path) => getJson(base + path)),
    get(`${base}onnx/model.onnx`).then((response) => response.arrayBuffer()),
  ]);
  const unknown = unknownSetting(config);
  if (unknown) throw new Error(`This page cannot sample from the model: in its scheduler, ${unknown}.`);
  const [session, ort, runtime] = await makeSession(new Uint8Array(weights), report);
  const size = [unetConfig.sample_size].flat();
  const shape = [unetConfig.in_channels, size[0], size[size.length - 1]];
  const nullLabel = index.null_class_label ?? null;
  const classes = (unetConfig.num_class_embeds ?? 0) - (nullLabel === null ? 0 : 1);

  async function unet(sample, t, labels) {
    const batch = sample.length / (shape[0] * shape[1] * shape[2]);
    const int64 = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [batch]);
    const inputs = { sample: new ort.Tensor("float32", sample, [batch, ...shape]), timestep: int64(Array(batch).fill(t)) };
    if (labels) inputs.class_labels = int64(labels);
    return (await session.run(inputs)).out_sample.data;
  }
  return { unet, config, alphasCumprod: makeAlphasCumprod(config), shape, classes, nullLabel, runtime };
}

async function getJson(address) {
  return (await get(address)).json();
}

async function get(address, options) {
  const response = await fetch(address, options).catch((error) => {
    throw new Error(`${address} cannot be loaded (${error.message}). Check the network and load the page again.`);
  });
  if (response.ok) return response;
  const advice = address.endsWith(".onnx") ? "; its owner can add it: python demo/serve.py, then push_to_hub.py" : "";
  const file = address.split("/").slice(-2).join("/");
  throw new Error(`The model has no ${file}, or may not be read (${response.status})${advice}.`);
}

// WebGPU where there is a GPU, else WASM, in several threads where the server allows it (cross-origin isolation).
async function makeSession(weights, report) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter && !adapter.info?.isFallbackAdapter) {
    try {
      return await startRuntime("webgpu", weights, report);
    } catch (error) {
      console.info(`WebGPU does not work here (${error.message}); WASM does.`);
    }
  }
  return startRuntime("wasm", weights, report);
}

async function startRuntime(name, weights, report) {
  report("Loading onnxruntime-web, which the browser keeps for the next visit…");
  const load = async ([file, integrity]) => (await get(CDN + file, { integrity })).arrayBuffer();
  const [script, wasm] = await Promise.all([load(RUNTIMES[name].script), load(RUNTIMES[name].wasm)]);
  const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const ort = await import(address);
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  Object.assign(ort.env.wasm, { wasmBinary: wasm, numThreads: threads });
  const session = await ort.InferenceSession.create(weights, { executionProviders: [name], logSeverityLevel: 3 });
  return [session, ort, name === "webgpu" ? "WebGPU" : `WASM, ${threads} thread${threads > 1 ? "s" : ""}`];
}
