// The sample browser, and buttons that copy a table. Texts of models reach the page through textContent alone, so they stay text.
"use strict";
(function () {
  const $ = (id) => document.getElementById(id);
  const form = $("filters");
  let data = null, shown = [], place = 0;

  function make(tag, text, name) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  }

  function fill(select, first, values) {
    const before = select.value;
    select.replaceChildren();
    const all = make("option", first);
    all.value = "";
    select.append(all);
    for (const [value, text] of values) {
      const option = make("option", text);
      option.value = value;
      select.append(option);
    }
    select.value = values.some(([value]) => String(value) === before) ? before : "";
  }

  // Values of a column with their counts, the most frequent first.
  function counted(samples, column) {
    const counts = new Map();
    for (const sample of samples) counts.set(sample[column], (counts.get(sample[column]) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || String(a[0]).localeCompare(String(b[0]))).map(([value, n]) => [value, value + " (" + n + ")"]);
  }

  function offer() {
    const group = form.group.value;
    const mine = data.samples.filter((sample) => group === "" || String(sample[0]) === group);
    fill(form.outcome, "any", counted(mine, 3));
    fill(form.category, "any", counted(mine, 2));
  }

  function select() {
    const group = form.group.value, outcome = form.outcome.value, category = form.category.value;
    const flip = form.flip.checked, text = form.text.value.toLowerCase();
    const has = text && data.texts.map((one) => one.toLowerCase().includes(text));
    shown = data.samples.filter((sample) =>
      (group === "" || String(sample[0]) === group) && (outcome === "" || sample[3] === outcome) &&
      (category === "" || sample[2] === category) && (!flip || sample[4]) &&
      (!text || sample[1].toLowerCase().includes(text) || [sample[5], sample[6], sample[7], ...sample[8].map((one) => one[2])].some((one) => one !== null && has[one])));
    place = 0;
    show();
  }

  function block(parent, title, text, name) {
    const part = make("div");
    part.append(make("h4", title), make("div", text === "" ? "(empty)" : text, "text " + (name || "")));
    parent.append(part);
  }

  function show() {
    const card = $("sample");
    card.replaceChildren();
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= shown.length - 1;
    $("place").textContent = shown.length ? (place + 1).toLocaleString("en") + " of " + shown.length.toLocaleString("en") : "none matches";
    card.hidden = !shown.length;
    if (!shown.length) return;
    const [group, question, category, outcome, flip, asked, answer, opponent, verdicts] = data.samples[data.samples.indexOf(shown[place])];
    const facts = data.groups[group];
    const head = make("p");
    head.append(make("b", outcome), make("span", "  " + (flip ? "· verdict turns with the order " : "") + "· " + category + " · " + question + " · " + facts.title, "aside"));
    card.append(head);
    block(card, "question", data.texts[asked]);
    const sides = make("div", undefined, "sides");
    block(sides, "answer of " + facts.arm, data.texts[answer]);
    if (opponent !== null) block(sides, "answer of " + facts.opponent, data.texts[opponent]);
    card.append(sides);
    const raws = make("div", undefined, "sides");
    for (const [order, said, raw] of verdicts) {
      const names = { AB: facts.arm + " shown first", BA: facts.opponent + " shown first", grade: "grade" };
      const winner = { "AB,A": facts.arm, "AB,B": facts.opponent, "BA,A": facts.opponent, "BA,B": facts.arm }[order + "," + said];
      block(raws, "verdict, " + (names[order] || order) + ": " + said + (winner ? " (" + winner + ")" : ""), raw === null ? "(nothing stored)" : data.texts[raw], "raw");
    }
    card.append(raws);
    card.append(make("p", "files: " + facts.folder, "aside"));
  }

  function start() {
    data = JSON.parse($("sample-data").textContent);
    fill(form.group, "all", data.groups.map((group, number) => [number, group.title]));
    if (data.groups.length) form.group.value = "0";
    offer();
    form.group.addEventListener("change", () => { offer(); select(); });
    for (const name of ["outcome", "category", "flip"]) form[name].addEventListener("change", select);
    form.text.addEventListener("input", select);
    form.addEventListener("submit", (event) => event.preventDefault());
    $("previous").addEventListener("click", () => { if (place > 0) { place--; show(); } });
    $("next").addEventListener("click", () => { if (place < shown.length - 1) { place++; show(); } });
    select();
  }

  // ---- Copying a table ----

  const cells = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " ")));
  const latex = (text) => text.replace(/[\\{}$&#%_^~<>\u2212]/g, (one) => ({ "\\": "\\textbackslash{}", "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}", "\u2212": "$-$" })[one] || "\\" + one);
  const forms = {
    Markdown: (rows) => [rows[0], rows[0].map(() => "---"), ...rows.slice(1)]
      .map((row) => "| " + row.map((cell) => cell.replace(/[\\|<>`*_[\]]/g, "\\$&")).join(" | ") + " |").join("\n") + "\n",
    // A spreadsheet takes a cell that begins so for a formula.
    CSV: (rows) => rows.map((row) => row.map((cell) => '"' + (/^[=+@-]/.test(cell) ? "'" : "") + cell.replace(/"/g, '""') + '"').join(",")).join("\r\n") + "\r\n",
    LaTeX: (rows) => "\\begin{tabular}{" + "l".repeat(rows[0].length) + "}\n\\toprule\n" + rows.map((row, n) => row.map(latex).join(" & ") +
      " \\\\" + (n ? "" : "\n\\midrule")).join("\n") + "\n\\bottomrule\n\\end{tabular}\n",
  };

  function copy(text, button, name) {
    const said = (word) => { button.textContent = word; setTimeout(() => { button.textContent = name; }, 1500); };
    const byHand = () => {
      const area = make("textarea", text);
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      said(done ? "copied" : "not allowed here");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => said("copied"), byHand);
    else byHand();
  }

  function offerCopies(one) {
    const line = make("p", "copy: ", "copy");
    const texts = one.tagName === "TABLE" ? Object.entries(forms).map(([name, form]) => [name, () => form(cells(one))]) : [["commands", () => one.textContent]];
    for (const [name, text] of texts) {
      const button = make("button", name);
      button.type = "button";
      button.title = "copy " + one.dataset.copy + " as " + name;
      button.addEventListener("click", () => copy(text(), button, name));
      line.append(button, " ");
    }
    one.after(line);
  }

  // ---- On a phone the page is short: what stands below the first table is folded, and opened by its link ----

  function reveal() {
    const aim = document.getElementById(location.hash.slice(1));
    const part = aim && aim.querySelector(":scope > .part");
    if (part) part.open = true;
  }

  if (matchMedia("(max-width: 52rem)").matches) document.querySelectorAll(".part").forEach((part) => { part.open = false; });
  window.addEventListener("hashchange", reveal);
  document.querySelectorAll("nav a").forEach((link) => link.addEventListener("click", () => setTimeout(reveal, 0)));
  reveal();

  document.querySelectorAll("[data-copy]").forEach(offerCopies);
  window.addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("main details, header details")) one.open = true; });
  if (form) setTimeout(start, 0);
})();
