// A square to write on, by finger, pen, mouse or keyboard. props.value: the drawing, white on black, as a data URL.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const PEN_WIDTH = 24; // of 280: about what a pen leaves in MNIST
const pen = { x: 140, y: 140, down: false, seen: false };

function clear() {
  context.fillStyle = "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(pen, { x: 140, y: 140, down: false });
  props.value = null;
}

function line(x, y) {
  Object.assign(context, { strokeStyle: "white", lineWidth: PEN_WIDTH, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.moveTo(pen.x, pen.y);
  context.lineTo(x, y);
  context.stroke();
  Object.assign(pen, { x, y });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

function lift() {
  if (pen.down) props.value = canvas.toDataURL("image/png");
  pen.down = false;
}

canvas.onpointerdown = (event) => {
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  [pen.x, pen.y] = place(event);
  pen.down = true;
  line(pen.x, pen.y);
};
canvas.onpointermove = (event) => {
  if (pen.down && event.buttons) line(...place(event));
};
canvas.onpointerup = canvas.onpointercancel = lift;

const MOVES = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
canvas.onkeydown = (event) => {
  const within = (value) => Math.max(PEN_WIDTH / 2, Math.min(canvas.width - PEN_WIDTH / 2, value));
  if (MOVES[event.key]) {
    const [x, y] = [within(pen.x + MOVES[event.key][0]), within(pen.y + MOVES[event.key][1])];
    pen.down ? line(x, y) : Object.assign(pen, { x, y });
  } else if (event.key === " ") {
    pen.down ? lift() : ((pen.down = true), line(pen.x, pen.y));
  } else return;
  event.preventDefault();
  if (pen.down) props.value = canvas.toDataURL("image/png");
  mark();
};

// Where the keyboard's pen is: a ring, which is not part of the drawing.
const ring = element.querySelector(".ring");
function mark() {
  ring.style.left = `${(100 * pen.x) / canvas.width}%`;
  ring.style.top = `${(100 * pen.y) / canvas.height}%`;
  ring.classList.toggle("down", pen.down);
  ring.hidden = false;
}
canvas.onblur = () => {
  lift();
  ring.hidden = true;
};

element.querySelector(".clear").onclick = clear;
clear();
