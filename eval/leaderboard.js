// Sorting, filtering and links of the leaderboard; without it the page shows everything as it is.
const root = document.documentElement;
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const find = (id) => document.getElementById(id);
const entries = all(".entry");
const points = all("svg a[data-row]");

// Sorting: numbers by value, text by the alphabet, what is missing last either way.
function compare(a, b, column, direction) {
  const [x, y] = [a, b].map((entry) => entry.rows[0].cells[column].dataset.value ?? "");
  if (x === "" || y === "") return (x === "") - (y === "");
  const numeric = isFinite(x) && isFinite(y);
  return direction * (numeric ? x - y : x.localeCompare(y, "en"));
}

function sortBy(header) {
  const table = header.closest("table");
  const first = header.dataset.first === "descending" ? -1 : 1;
  const again = header.ariaSort === (first > 0 ? "ascending" : "descending");
  const direction = again ? -first : first;
  const rows = all(".entry", table);
  rows.sort((a, b) => compare(a, b, header.cellIndex, direction));
  for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
  header.ariaSort = direction > 0 ? "ascending" : "descending";
  table.append(...rows);
}
for (const header of all("th[data-first]")) {
  header.querySelector("button").addEventListener("click", () => sortBy(header));
}

// The filter: every word must occur in the row.
const box = find("filter");
const front = find("front");
function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  const kept = new Map();
  for (const entry of entries) {
    const fits = words.every((word) => entry.dataset.search.includes(word));
    const keep = fits && (!front.checked || entry.dataset.front !== "");
    entry.classList.toggle("gone", !keep);
    kept.set(entry.dataset.row, keep);
    shown += keep;
  }
  for (const point of points) point.classList.toggle("gone", !kept.get(point.dataset.row));
  for (const section of all("main section")) {
    const none = !section.querySelector(".entry:not(.gone)");
    section.querySelector(".empty").style.display = none ? "block" : "none";
  }
  find("count").textContent = `${shown} of ${entries.length} rows`;
}
box.addEventListener("input", filter);
front.addEventListener("change", filter);
filter();

// Details: a row's records and samples, opened by their button or by any of its numbers.
function open(entry, wanted = true) {
  entry.querySelector(".more").classList.toggle("open", wanted);
  entry.querySelector(".toggle").ariaExpanded = String(wanted);
}
for (const entry of entries) {
  const button = entry.querySelector(".toggle");
  button.addEventListener("click", () => open(entry, button.ariaExpanded !== "true"));
}

// Links within the page: to a row from a point, to a record from a number.
function follow() {
  const [, kind, print] = location.hash.match(/^#(row|record)-(\w+)$/) ?? [];
  for (const entry of all(".entry.target")) entry.classList.remove("target");
  const entry = print && find(`row-${print}`);
  if (!entry) return;
  if (entry.classList.contains("gone")) {
    box.value = "";
    front.checked = false;
    filter();
  }
  entry.classList.add("target");
  if (kind === "record") open(entry);
  entry.scrollIntoView({ block: kind === "record" ? "start" : "center", inline: "nearest" });
  entry.querySelector(".toggle").focus({ preventScroll: true });
}
window.addEventListener("hashchange", follow);
for (const link of all('a[href^="#r"]')) {
  // The same link twice changes no hash.
  link.addEventListener("click", () => link.hash === location.hash && follow());
}
follow();

// A row lights up its points, a point its row, with a note beside it.
const tip = find("tip");
function light(print, on) {
  for (const other of [...entries, ...points]) {
    if (other.dataset.row === print) other.classList.toggle("lit", on);
  }
}
function note(point, on) {
  light(point.dataset.row, on);
  tip.hidden = !on;
  if (!on) return;
  tip.textContent = point.getAttribute("aria-label");
  const at = point.querySelector(".dot").getBoundingClientRect();
  const left = Math.min(at.left + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${at.top > 70 ? at.top - tip.offsetHeight - 8 : at.bottom + 8}px`;
}
for (const point of points) {
  point.querySelector("title").remove(); // the note takes its place
  for (const event of ["mouseenter", "focus"]) point.addEventListener(event, () => note(point, true));
  for (const event of ["mouseleave", "blur"]) point.addEventListener(event, () => note(point, false));
}
for (const entry of entries) {
  entry.addEventListener("mouseenter", () => light(entry.dataset.row, true));
  entry.addEventListener("mouseleave", () => light(entry.dataset.row, false));
}

// Colours: the system's, until the button is pressed.
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const relabel = () => { find("theme").textContent = isDark() ? "Light" : "Dark"; };
dark.addEventListener("change", relabel);
find("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  relabel();
});
relabel();

addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input")) {
    event.preventDefault();
    box.focus();
  } else if (event.key === "Escape" && event.target === box) {
    box.value = "";
    filter();
  }
});
