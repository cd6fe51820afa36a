// The steps of a drawing: for each image x_t above, and below it the x_0 that the model predicts from it.
// props.value (of `film` in drawing.py): {frames: [{t, left, png}], names, width, height, steps, done, query, file, original}.
// A frame's png has a row for each image: x_t on the left, the predicted x_0 on the right.
const find = (name) => element.querySelector(name);
const [caption, tiles, slider, play] = [".caption", ".tiles", ".scrub input", ".play"].map(find);
let pictures = []; // decoded frames, in order
let drawing = 0; // which drawing is shown; a picture of an older one is dropped when it arrives
let held = false; // the visitor has taken the slider: new frames no longer move it
let timer = null;

function makeTile(name, note) {
  const tile = document.createElement("figure");
  for (const what of note ? ["x_0"] : ["x_t", "predicted x_0"]) {
    const canvas = Object.assign(document.createElement("canvas"), { width: props.value.width, height: props.value.height });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${what} of ${name}`);
    tile.append(canvas);
  }
  const link = document.createElement(note ? "span" : "a");
  link.textContent = name;
  if (!note) {
    Object.assign(link, { href: "#", title: "Save this image as PNG" });
    link.onclick = (event) => {
      event.preventDefault();
      save(tile.querySelectorAll("canvas")[1], `${props.value.file}-${[...tiles.children].indexOf(tile)}.png`);
    };
  }
  const figcaption = document.createElement("figcaption");
  figcaption.append(link);
  tile.append(figcaption);
  return tile;
}

function save(canvas, name) {
  const link = Object.assign(document.createElement("a"), { href: canvas.toDataURL("image/png"), download: name });
  link.click();
}

// All images side by side as they are now, enlarged four times; x_t above the predicted x_0.
function saveAll() {
  const { width, height, file, names } = props.value;
  const columns = Math.min(names.length, 10);
  const pairs = [...tiles.querySelectorAll("figure:not(.original)")].map((tile) => tile.querySelectorAll("canvas"));
  const last = Number(slider.value) === pictures.length - 1 && props.value.done; // both are x_0 there: one suffices
  const sheet = document.createElement("canvas");
  const rows = last ? 1 : 2;
  Object.assign(sheet, { width: 4 * width * columns, height: 4 * height * rows * Math.ceil(names.length / columns) });
  const context = sheet.getContext("2d");
  context.imageSmoothingEnabled = false;
  pairs.forEach((pair, i) => {
    [...pair].slice(2 - rows).forEach((canvas, row) => {
      const top = rows * Math.floor(i / columns) + row;
      context.drawImage(canvas, 4 * width * (i % columns), 4 * height * top, 4 * width, 4 * height);
    });
  });
  save(sheet, `${file}.png`);
}

function show(index) {
  const { width, height, frames, steps, done } = props.value;
  const picture = pictures[index];
  if (!picture) return;
  tiles.querySelectorAll("figure:not(.original)").forEach((tile, row) => {
    tile.querySelectorAll("canvas").forEach((canvas, column) => {
      canvas.getContext("2d").drawImage(picture, column * width, row * height, width, height, 0, 0, width, height);
    });
  });
  slider.max = frames.length - 1;
  slider.value = index;
  const { t, left } = frames[index];
  const words = t < 0
    ? `Done: x₀ after ${steps} steps. Slide back to see how it left the noise.`
    : `t = ${t}: above xₜ = ${left.toFixed(2)} x₀ + ${Math.sqrt(1 - left * left).toFixed(2)} ε; below the x₀ predicted from it.`;
  caption.textContent = done || t < 0 ? words : `Drawing… ${words}`;
  slider.setAttribute("aria-valuetext", words);
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "▶";
  play.setAttribute("aria-label", "Play the steps");
}

function begin() {
  stop();
  drawing += 1;
  pictures = [];
  held = false;
  element.dataset.done = "false";
  caption.textContent = "Drawing…";
  tiles.replaceChildren(...props.value.names.map((name) => makeTile(name, false)));
  if (props.value.original) {
    const tile = makeTile("yours, as MNIST", true);
    tile.className = "original";
    const image = new Image();
    image.onload = () => tile.querySelector("canvas").getContext("2d").drawImage(image, 0, 0);
    image.src = props.value.original;
    tiles.prepend(tile);
  }
}

// New frames have arrived. A drawing starts with one frame.
let known = 0; // frames that are decoded or on the way
let first = null; // the first of them: another one is another drawing
function update() {
  const value = props.value;
  find(".film").classList.toggle("empty", !value);
  if (!value) return;
  if (value.frames.length < known || value.frames[0].png !== first) begin(), (known = 0);
  first = value.frames[0].png;
  const mine = drawing;
  for (; known < value.frames.length; known++) {
    const index = known, picture = new Image();
    picture.onload = () => {
      if (mine !== drawing) return;
      pictures[index] = picture;
      if (!held && index === props.value.frames.length - 1) show(index);
    };
    picture.src = value.frames[index].png;
  }
  if (value.done) finish(value);
}

function finish(value) {
  element.dataset.done = "true";
  const link = find(".link");
  link.hidden = !value.query;
  if (value.query) {
    const address = new URL(`?${value.query}`, location.href.split("?")[0].split("#")[0]);
    link.href = address;
    if (element.dataset.opened) {
      history.replaceState(null, "", address); // the address bar holds the picture that is seen
      if (window.parent !== window) window.parent.postMessage({ queryString: `?${value.query}` }, "https://huggingface.co");
    }
    element.dataset.opened = "true"; // the page's first picture leaves the address as it was
  }
  window.lastDrawn = value; // for schedule.js, which may be loaded later
  dispatchEvent(new CustomEvent("drawn", { detail: value }));
}

slider.oninput = () => {
  held = true;
  stop();
  show(Number(slider.value));
};
play.onclick = () => {
  if (timer) return stop();
  held = true;
  if (slider.value === slider.max) show(0);
  play.textContent = "❚❚";
  play.setAttribute("aria-label", "Pause");
  timer = setInterval(() => {
    show(Number(slider.value) + 1);
    if (slider.value === slider.max) stop();
  }, 100);
};
find(".save").onclick = (event) => {
  event.preventDefault();
  if (pictures.length) saveAll();
};
watch("value", update);
update();
