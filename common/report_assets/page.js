// What tables and maps share: building elements, formatting numbers, the tooltip.

const dash = "–";

/** Build an element; attributes whose value is null or false are left out, texts become text nodes. */
function build(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function formatNumber(value, digits) {
  if (value === null) return dash;
  let text;
  if (digits !== null) {
    text = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  } else if (Number.isInteger(value) || Math.abs(value) >= 1000) {
    text = value.toLocaleString("en", { maximumFractionDigits: 0 });
  } else if (Math.abs(value) < 1e-4) {
    text = value.toExponential(2);
  } else {
    text = value.toLocaleString("en", { maximumSignificantDigits: 4 });
  }
  return text.replace(/^-/, "−");
}

const formatPercent = (value, digits) => (value === null ? dash : formatNumber(100 * value, digits ?? 1) + "%");

/** The largest of numbers that are at least 0; Math.max(...) fails beyond some 100,000 of them. */
const largest = (numbers) => numbers.reduce((most, number) => Math.max(most, number), 0);

const readData = (id) => JSON.parse(document.getElementById(id).textContent);

// --- tooltip -------------------------------------------------------------------------------------------------------

const tip = document.getElementById("tip");

/** Show text (and a bold title) beside a point of the window. */
function showTip(x, y, text, title = "") {
  tip.replaceChildren(...(title ? [build("b", { dir: "auto" }, title)] : []), build("span", { dir: "auto" }, text));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > document.documentElement.clientWidth ? x - width - 14 : x + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - height - 4))}px`;
}

const hideTip = () => { tip.hidden = true; };

document.addEventListener("pointermove", (event) => {
  const shape = event.target.closest?.("[data-tip]");
  if (shape) showTip(event.clientX, event.clientY, shape.dataset.tip);
  else if (!event.target.closest?.("canvas")) hideTip();
});
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
