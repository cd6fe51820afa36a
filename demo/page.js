// The page: its tabs, what can be asked for, and its address, which holds the picture that is seen. worker.js draws.
import { Film } from "./film.js";
import { Pad } from "./pad.js";
import { visitedTimesteps } from "./sampler.js";
import { Schedule } from "./schedule.js";

const REPO = /^[A-Za-z0-9][\w.-]{0,95}\/[A-Za-z0-9][\w.-]{0,95}$/; // USER/NAME on the Hub
const SETTINGS = ["label", "count", "guidance", "sampler", "steps", "seed"]; // fields of the form, and of the address
const GUIDANCE = 1.5; // for a digit that the visitor wrote
const EACH = "each"; // the label that stands for all labels in turn
const NONE = "none"; // the label that stands for none

const find = (name) => document.querySelector(name);
const all = (name) => [...document.querySelectorAll(name)];
const [drawForm, writeForm] = [find("#draw form"), find("#write form")];
const films = { draw: new Film(find("#draw .film")), write: new Film(find("#write .film")) };
const pad = new Pad(find(".pad"));
const worker = new Worker("worker.js", { type: "module" });
const remembered = new Map(); // address -> the finished drawing, so that "back" shows it at once
let model = null; // what worker.js says of it
let schedule = null;
let job = null; // the drawing that is under way: {id, film, ...}
let jobs = 0;
let writeSeed = 0;

// ---- one drawing at a time -------------------------------------------------------------------------------------------

worker.onerror = () => fail("This browser cannot run the page: it needs one from 2023 or later.");
worker.onmessage = ({ data }) => {
  if (data.report) films.draw.say(data.report);
  if (data.ready) start(data.ready);
  if (data.failed && !data.id) fail(data.failed);
  if (!job || data.id !== job.id) return;
  if (data.frame) job.film.add(data.frame);
  if (data.failed) end("failed", `This failed: ${data.failed}`);
  if (data.done !== undefined) {
    const { film, shown } = job;
    const [seconds, each] = [(data.done / 1000).toFixed(1), (data.done / shown.steps).toFixed(0)];
    end("done", `Done: ${shown.steps} steps in ${seconds} s, ${each} ms a step.`);
    if (film === films.draw) keep(film, shown);
  }
};

function fail(words) {
  for (const film of Object.values(films)) film.finish("failed", words);
}

// shown: see Film.begin; asked: see draw in worker.js
function begin(film, shown, asked) {
  stop();
  jobs += 1;
  job = { id: jobs, film, shown };
  film.begin(shown);
  film.say("Drawing begins…");
  film.root.scrollIntoView({ block: "nearest", behavior: "smooth" }); // on a phone, it may lie below the fold
  all(".stop").forEach((button) => (button.disabled = false));
  worker.postMessage({ draw: { id: job.id, ...asked } });
}

function end(state, words) {
  const { film } = job;
  job = null;
  all(".stop").forEach((button) => (button.disabled = true));
  film.finish(state, words);
}

function countSteps(steps, until = Infinity) {
  return visitedTimesteps(model.config, steps).filter((t) => t <= until).length || 1;
}

function stop() {
  if (!job) return;
  worker.postMessage({ stop: true });
  end("stopped", `Stopped after ${job.film.taken()} of ${job.shown.steps} steps.`);
}

function keep(film, shown) {
  remembered.set(shown.link, { shown, frames: film.frames, ending: film.ending });
  if (remembered.size > 20) remembered.delete(remembered.keys().next().value);
  schedule.take(film.frames[film.frames.length - 1].x_0);
}

// ---- the tab "Draw" --------------------------------------------------------------------------------------------------

function settings() {
  const values = Object.fromEntries(new FormData(drawForm));
  return Object.fromEntries(SETTINGS.filter((name) => name in values).map((name) => [name, values[name]]));
}

function valid(form) {
  if (!form.checkValidity()) form.querySelectorAll("details").forEach((details) => (details.open = true));
  return form.reportValidity();
}

// pushes: the address bar gets the picture's address, and "back" leads to the picture before.
function draw(pushes) {
  if (!model || !valid(drawForm)) return;
  const { label, guidance, sampler, ...numbers } = settings();
  const [count, steps, seed] = [numbers.count, numbers.steps, numbers.seed].map(Number);
  const numberOf = (i) => (label === EACH ? i % model.classes : Number(label));
  const labels = model.classes ? Array.from({ length: count }, (_, i) => numberOf(i)) : null;
  const link = addressOf(settings());
  if (pushes && link !== location.href) history.pushState(null, "", link);
  tellTheHub();
  const kept = remembered.get(link);
  if (kept && !pushes) {
    stop();
    films.draw.begin(kept.shown);
    kept.frames.forEach((frame) => films.draw.add(frame));
    films.draw.finish("done", kept.ending);
    return;
  }
  const names = labels?.map(String) ?? Array(count).fill(null);
  const shown = { names, shape: model.shape, steps: countSteps(steps), link, file: `images-seed${seed}` };
  begin(films.draw, shown, { sampler, steps, seed, count, labels, scale: Number(guidance ?? 1) });
}

drawForm.onsubmit = (event) => {
  event.preventDefault();
  say("");
  draw(true);
};
drawForm.querySelector(".another").onclick = () => {
  const field = drawForm.elements.seed;
  field.value = (Number(field.value) + 1) % (Number(field.max) + 1);
  drawForm.requestSubmit();
};

// ---- the tab "Write one" ---------------------------------------------------------------------------------------------

writeForm.onsubmit = (event) => {
  event.preventDefault();
  if (!model || !valid(writeForm)) return;
  const written = pad.read(model.shape[1]);
  if (!written) {
    films.write.say("Nothing is written yet: write on the black square first.");
    return;
  }
  const { label = NONE, ...numbers } = Object.fromEntries(new FormData(writeForm));
  const [count, until] = [Number(numbers.count), Number(numbers.until)];
  const labels = model.classes ? Array(count).fill(label === NONE ? model.nullLabel : Number(label)) : null;
  const steps = Math.min(50, model.config.num_train_timesteps);
  const original = written.map((value) => 255 * value);
  const shown = { names: Array(count).fill(null), shape: model.shape, steps: countSteps(steps, until), original };
  const x_0 = written.map((value) => 2 * value - 1);
  const scale = label === NONE || model.nullLabel === null ? 1 : GUIDANCE;
  const asked = { sampler: "ddim", steps, seed: writeSeed, count, labels, scale, x_0, until };
  begin(films.write, { ...shown, file: `written-t${until}` }, asked);
};
writeForm.querySelector(".another").onclick = () => {
  writeSeed += 1;
  writeForm.requestSubmit();
};
writeForm.querySelector(".clear").onclick = () => pad.clear();
writeForm.elements.until.oninput = ({ target }) => (writeForm.querySelector("output").textContent = target.value);
all(".stop").forEach((button) => (button.onclick = stop));

// ---- tabs and the address --------------------------------------------------------------------------------------------

const tabs = all("[role=tab]");
function showTab(name) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    find(`#${tab.getAttribute("aria-controls")}`).hidden = !chosen;
  }
}
for (const tab of tabs) {
  tab.onclick = () => {
    const name = tab.getAttribute("aria-controls");
    const address = new URL(location);
    if (name === "draw") address.searchParams.delete("tab");
    else address.searchParams.set("tab", name);
    history.replaceState(null, "", address);
    showTab(name);
    tab.focus();
  };
  tab.onkeydown = ({ key }) => {
    const shown = tabs.filter((other) => !other.hidden);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (step) shown[(shown.indexOf(tab) + step + shown.length) % shown.length].click();
  };
}

function addressOf(values) {
  const address = new URL(location.pathname, location);
  const given = new URLSearchParams(location.search).get("model");
  address.search = new URLSearchParams({ ...(given && { model: given }), ...values });
  return address.href;
}

// Puts what the address says into the form. What it cannot be stays at the default, and is said.
function readAddress() {
  const given = new URLSearchParams(location.search);
  const wrong = [];
  drawForm.reset();
  for (const name of SETTINGS.filter((name) => given.has(name))) {
    const [field, value] = [drawForm.elements[name], given.get(name)];
    if (!field || (name === "guidance" && model.nullLabel === null)) {
      wrong.push(`this model knows no ${name}, and the address's is ignored`);
      continue;
    }
    const before = field.value;
    field.value = value;
    if (field.value !== value || field.validity?.valid === false) {
      field.value = before;
      wrong.push(`${name} in the address must be ${choices(field)}; ${before} is drawn`);
    }
  }
  say(wrong.join(". "));
  showTab(["write", "schedule"].find((tab) => tab === given.get("tab") && !find(`#tab-${tab}`).hidden) ?? "draw");
}

function choices(field) {
  if (field.min) return `from ${field.min} to ${field.max}`;
  const values = field.options ? [...field.options] : [...field];
  return `one of ${values.map(({ value }) => value).join(", ")}`;
}

function say(words) {
  Object.assign(find("#notice"), { textContent: words && `Note: ${words}.`, hidden: !words });
}

function tellTheHub() {
  if (window.parent !== window) window.parent.postMessage({ queryString: location.search }, "https://huggingface.co");
}

window.onpopstate = () => {
  if (!model) return;
  readAddress();
  draw(false);
};

// ---- the start -------------------------------------------------------------------------------------------------------

function start(ready) {
  model = ready;
  find("#runtime").textContent = ` on ${model.runtime}`;
  const T = model.config.num_train_timesteps;
  Object.assign(drawForm.elements.steps, { max: T, defaultValue: Math.min(50, T) });
  const { until } = writeForm.elements;
  Object.assign(until, { max: T - 1, value: Math.round(0.4 * T) });
  until.oninput({ target: until });
  const digits = Array.from({ length: model.classes }, (_, label) => [String(label), String(label)]);
  offerLabels(drawForm, [[EACH, "each in turn"], ...digits]);
  offerLabels(writeForm, [...(model.nullLabel === null ? [] : [[NONE, "none"]]), ...digits]);
  find(".guidance").hidden = find(".guidance input").disabled = !model.classes || model.nullLabel === null;
  find("#tab-write").hidden = model.shape[0] !== 1 || model.shape[1] !== model.shape[2];
  schedule = new Schedule(find("#schedule"), model);
  readAddress();
  draw(false);
}

function offerLabels(form, labels) {
  const fieldset = form.querySelector(".labels");
  fieldset.hidden = !model.classes;
  if (!model.classes) return;
  labels.forEach(([value, words], i) => {
    const [chip, radio] = [document.createElement("label"), document.createElement("input")];
    Object.assign(radio, { type: "radio", name: "label", value, defaultChecked: i === 0 });
    chip.append(radio, words);
    fieldset.append(chip);
  });
}

async function open() {
  all("details").forEach((details) => (details.open = matchMedia("(min-width: 760px)").matches));
  showTab(new URLSearchParams(location.search).get("tab") === "write" ? "write" : "draw");
  films.write.say(find("#write .explained").textContent);
  films.draw.begin({ names: Array(10).fill(null), shape: [1, 28, 28], steps: 1 });
  const asked = new URLSearchParams(location.search).get("model");
  const [repo, revision = "main"] = (asked ?? "").split("@");
  if (asked !== null && !REPO.test(repo)) return fail("The address must name the model as on the Hub: ?model=USER/NAME.");
  const beside = await fetch("model.txt");
  if (!beside.ok) return fail("No model lies beside this page: python demo/serve.py --model FOLDER puts one there.");
  const name = asked ?? (await beside.text()).trim();
  const link = find("#model");
  link.textContent = name;
  if (REPO.test(asked ? repo : name)) link.href = `https://huggingface.co/${asked ? repo : name}`;
  document.title = `Watch diffusion draw: ${name}`;
  const hub = `https://huggingface.co/${repo}/resolve/${encodeURIComponent(revision)}/`;
  worker.postMessage({ load: new URL(asked ? hub : "model/", location).href });
}
open().catch((error) => fail(`The page cannot be loaded: ${error.message}.`));
