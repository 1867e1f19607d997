// The page itself: data that register, the state that the address holds, keys, and small helpers.
// Texts of the archive become text nodes, never markup.
"use strict";

const residua = {
  data: {},
  waiting: {},
  views: {},
  state: {},

  // Every data file calls this with its name and its value.
  register(name, value) {
    this.data[name] = value;
  },

  // Load data/NAME.js unless it is there; the file path comes from the archive's own data file.
  load(file) {
    const name = file.slice(file.lastIndexOf("/") + 1, -3);
    if (name in this.data) return Promise.resolve(this.data[name]);
    if (!this.waiting[name]) {
      this.waiting[name] = new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = file;
        script.onload = () => resolve(this.data[name]);
        script.onerror = () => reject(new Error(`${file} is missing: copy the whole folder of the page`));
        document.head.append(script);
      });
    }
    return this.waiting[name];
  },
};

// An element with attributes and children; a child that is a string becomes text.
residua.el = (tag, attributes, ...children) => {
  const svg = ["svg", "g", "rect", "path", "line", "text", "circle", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
};

residua.unpack = (text, Type) => {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  return new Type(bytes.buffer);
};

residua.number = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
};

residua.count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));

residua.bytes = (value) => {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toFixed(value < 10 ? 1 : 0) : value} ${units[unit]}`;
};

residua.measureLabel = (name) => (name === "distance" ? "distance to the mean" : name);

residua.shareBar = (share) => {
  const bar = residua.el("span", { class: "bar-track", "aria-hidden": "true" }, residua.el("span", { class: "bar-fill" }));
  bar.firstChild.style.width = `${Math.max(1, share * 100).toFixed(1)}%`;
  return bar;
};

// What the address says, as far as it fits this archive.
residua.read = () => {
  const asked = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(asked.get(name) || "") ? Number(asked.get(name)) : null);
  const { sites } = residua.data.archive;
  const state = {
    view: asked.get("view") || (asked.has("example") ? "examples" : "archive"),
    example: whole("example"),
    token: whole("token"),
    layer: whole("layer"),
    head: whole("head"),
    score: asked.get("score"),
    lens: asked.get("lens") === "on",
  };
  if (!residua.order.includes(state.view)) state.view = "archive";
  const by = asked.get("by");
  const named = sites.find((site) => site.site === asked.get("site"));
  const owner = sites.find((site) => site.measures.some((one) => one.name === by));
  const has = (site) => site && site.measures.some((one) => one.name === by);
  const site = has(named) ? named : by && owner && !named ? owner : named || sites[sites.length - 1];
  state.site = site.site;
  state.by = has(site) ? by : "norm";
  residua.state = state;
};

residua.order = ["archive", "examples", "directions", "heads"];

residua.link = (changes) => {
  const state = { ...residua.state, ...changes };
  const parts = new URLSearchParams();
  if (state.view !== "examples" || state.example === null) parts.set("view", state.view);
  const wanted = {
    examples: ["example", "site", "token", "by", "lens"],
    directions: ["site", "by"],
    heads: ["layer", "head", "score", "example", "token"],
    archive: [],
  }[state.view];
  for (const name of wanted) {
    const value = state[name];
    if (value === null || value === undefined || value === false) continue;
    parts.set(name, value === true ? "on" : value);
  }
  return `#${parts}`;
};

// Change the state, the address and what is drawn.
residua.go = (changes) => {
  const before = residua.state;
  const address = residua.link(changes);
  residua.state = { ...before, ...changes };
  if (address !== location.hash) {
    const known = residua.state.view === before.view;
    history[known ? "replaceState" : "pushState"](null, "", address);
  }
  residua.draw(before);
};

residua.say = (text) => {
  document.getElementById("status").textContent = text;
};

residua.draw = (before) => {
  const { view } = residua.state;
  for (const tab of document.querySelectorAll("#tabs a")) {
    if (tab.dataset.view === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
    tab.href = residua.link({ view: tab.dataset.view });
  }
  const place = document.getElementById("view");
  if (!before || before.view !== view) {
    place.className = `view-${view}`;
    place.replaceChildren();
    residua.say("");
    residua.views[view].build(place);
  }
  Promise.resolve(residua.views[view].draw(before)).catch((error) => residua.say(error.message));
};

residua.keys = [
  ["j or ↓", "next example"],
  ["k or ↑", "previous example"],
  ["l or →", "next token"],
  ["h or ←", "previous token"],
  ["] and [", "next and previous site"],
  ["b", "next measure to colour by"],
  ["r", "lens read-outs under each token"],
  ["1 to 4", "the views"],
  ["/", "search in texts"],
  ["?", "this help"],
  ["Esc", "close, or leave the search"],
];

residua.help = () => {
  const dialog = document.getElementById("keys");
  const { el } = residua;
  if (!dialog.firstChild) {
    const lines = residua.keys.map(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)]);
    dialog.append(
      el("h2", { id: "keys-title" }, "Keys"),
      el("dl", {}, lines),
      el("p", {}, "The address of the page holds what is selected: copy it to share a view."),
      el("button", { type: "button", onclick: () => dialog.close() }, "Close"),
    );
  }
  if (dialog.open) dialog.close();
  else dialog.showModal();
};

residua.theme = (wanted) => {
  const dark = wanted === "dark";
  document.documentElement.dataset.theme = wanted;
  document.getElementById("theme").textContent = dark ? "Light" : "Dark";
};

residua.onkey = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest && event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (field) field.blur();
    return;
  }
  if (field || document.getElementById("keys").open) return;
  const view = residua.views[residua.state.view];
  if (event.key === "?") residua.help();
  else if (/^[1-4]$/.test(event.key) && document.querySelectorAll("#tabs a")[event.key - 1]) {
    residua.go({ view: document.querySelectorAll("#tabs a")[event.key - 1].dataset.view });
  } else if (event.key === "/" && residua.views.examples.search) {
    if (residua.state.view !== "examples") residua.go({ view: "examples" });
    residua.views.examples.search();
  } else if (!view.onkey || !view.onkey(event.key)) return;
  event.preventDefault();
};

document.addEventListener("DOMContentLoaded", () => {
  const { archive } = residua.data;
  if (!archive || !residua.data.examples) {
    residua.say("The folder data is missing beside this page: copy the whole folder.");
    return;
  }
  const started = performance.now();
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  residua.theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => {
    residua.theme(dark.matches ? "dark" : "light");
    residua.draw(null);
  });
  document.getElementById("theme").addEventListener("click", () => {
    residua.theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    residua.draw(null);
  });
  document.getElementById("help").addEventListener("click", residua.help);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("view").focus();
  });
  document.title = `${archive.path} · Residua`;
  document.getElementById("name").textContent = archive.path;
  document.getElementById("summary").textContent = [
    `${residua.count(archive.rows)} rows`,
    `${residua.count(archive.n_examples)} examples`,
    `${archive.stored.length} sites`,
    residua.bytes(archive.stored_bytes),
  ].join(" · ");
  residua.examples = residua.unpackExamples();
  const labels = { archive: "Archive", examples: "Examples", directions: "Directions", heads: "Heads" };
  const hasHeads = archive.scores || Object.keys(archive.files.patterns).length;
  residua.order = residua.order.filter((view) => view !== "heads" || hasHeads);
  for (const view of residua.order) {
    document.getElementById("tabs").append(residua.el("a", { dataset: { view } }, labels[view]));
  }
  document.addEventListener("keydown", residua.onkey);
  window.addEventListener("hashchange", () => {
    const before = residua.state;
    residua.read();
    residua.draw(before);
  });
  window.addEventListener("popstate", () => {
    const before = residua.state;
    residua.read();
    residua.draw(before);
  });
  residua.read();
  residua.draw(null);
  // How long the page took, for whoever measures: until its scripts ran, and until it was drawn.
  document.documentElement.dataset.ready = performance.now().toFixed(0);
  document.documentElement.dataset.drawn = (performance.now() - started).toFixed(0);
});
