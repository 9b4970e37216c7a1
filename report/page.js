"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
let raw = false;

// One page at a time: the one that holds the address's target.
function show() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1))) || document.querySelector(".page");
  const page = target.closest(".page");
  document.querySelectorAll(".page").forEach((one) => one.classList.toggle("shown", one === page));
  document.querySelectorAll("nav a").forEach((link) => {
    if (link.hash === "#" + page.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  if (target.tagName === "DETAILS") target.open = true;
  page.querySelectorAll(".chart").forEach(draw);
  target.scrollIntoView();
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, paper] = ["--ink", "--line", "--paper"].map((name) => style.getPropertyValue(name).trim());
  const axis = { color: ink, gridcolor: line, zerolinecolor: line, linecolor: line };
  return { ink, line, paper, axis };
}

function draw(place) {
  const { figure, raw: texts, masked } = charts[place.dataset.chart];
  const { ink, line, paper, axis } = colours();
  const layout = { ...figure.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink } };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: line, font: { color: ink } };
  for (const name of ["xaxis", "yaxis"]) layout[name] = { ...layout[name], ...axis };
  const data = figure.data.map((trace, at) => (masked ? { ...trace, hovertext: (raw ? texts : masked)[at] } : trace));
  Plotly.react(place, data, layout, { responsive: true, displaylogo: false });
}

function redraw() {
  document.querySelectorAll(".page.shown .chart").forEach(draw);
}

document.getElementById("mask").addEventListener("click", (event) => {
  raw = !raw;
  event.target.setAttribute("aria-pressed", raw);
  event.target.textContent = raw ? "Mask words" : "Show words";
  document.querySelectorAll(".toxic").forEach((one) => { one.textContent = raw ? one.dataset.raw : one.dataset.masked; });
  redraw();
});

function sort(head) {
  const table = head.closest("table");
  const at = [...head.parentNode.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  const key = (row) => row.children[at].dataset.sort ?? row.children[at].textContent.trim();
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // what was not measured stays at the end
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  table.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

document.querySelectorAll(".sortable th").forEach((head) => head.querySelector("button").addEventListener("click", () => sort(head)));
dark.addEventListener("change", redraw);
addEventListener("hashchange", show);
document.documentElement.classList.add("scripted");
show();
