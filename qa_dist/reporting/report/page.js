(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // Every text below comes from a file that anyone may have written: it only ever becomes the text of a node.
  const element = (name, className = "", text = "") => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== "") made.textContent = text;
    return made;
  };
  const cell = (className, text) => element("td", className, text);
  const figure = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const counted = (number) => number.toLocaleString("en");

  makeReadable(data.charts);

  // the address holds what is shown of the examples, so a jump must not replace it
  const jump = (id) => {
    const target = byId(id);
    target?.scrollIntoView();
    target?.focus({ preventScroll: true });
  };
  for (const link of document.querySelectorAll("[data-jump]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      jump(link.getAttribute("href").slice(1));
    });
  }
  if (!data.examples) return;

  // ---------------------------------------------------------------------------------------------- examples

  const PER_PAGE = 50;
  const { examples, other, texts } = data;
  const size = examples.id.length;
  const figures = data.figures.map(([name]) => name);
  const lengths = texts.map((text) => text.split(/\s+/).filter(Boolean).length);
  const length = (i) => lengths[examples.text[i]];
  const hasOther = (i) => Boolean(other) && other.predicted[i] !== null;

  const fold = (text) => {
    if (/^[\x00-\x7f]*$/.test(text)) return text.toLowerCase();
    const bare = text.normalize("NFKD").replace(/\p{M}+/gu, "");
    return bare.toUpperCase().toLowerCase().replaceAll("ς", "σ"); // upper case first: ß is ss
  };
  let folded = null;
  const haystacks = () => {
    folded ??= {
      texts: texts.map(fold),
      own: examples.id.map((id, i) => {
        const outputs = [examples.predicted[i], other?.predicted[i] ?? "", ...examples.expected[i]];
        return fold([id, examples.heading[i], ...outputs].join("\n"));
      }),
    };
    return folded;
  };
  (window.requestIdleCallback ?? setTimeout)(haystacks); // ready before the first letter is typed

  const START = { q: "", show: "all", sort: "order", desc: "", page: "1", open: "", group: "" };
  let state = { ...START };

  const matches = () => {
    const words = fold(state.q).split(/\s+/).filter(Boolean);
    if (!words.length) return () => true;
    const { texts: contexts, own } = haystacks();
    const inText = words.map((word) => contexts.map((text) => text.includes(word)));
    return (i) => words.every((word, w) => inText[w][examples.text[i]] || own[i].includes(word));
  };
  const isShown = () => {
    const tests = {
      wrong: (i) => !examples.right[i],
      right: (i) => Boolean(examples.right[i]),
      fixed: (i) => hasOther(i) && examples.right[i] && !other.right[i],
      broken: (i) => hasOther(i) && !examples.right[i] && other.right[i],
      changed: (i) => hasOther(i) && examples.predicted[i] !== other.predicted[i],
      differs: (i) => hasOther(i) && other.differs[i],
      alone: (i) => !hasOther(i),
    };
    if (state.show.startsWith("is:")) {
      const outcome = data.outcomes.indexOf(state.show.slice(3));
      return (i) => examples.outcomes[i].includes(outcome);
    }
    return tests[state.show] ?? (() => true);
  };
  const groupOf = () => {
    const [, name, group] = /^([^=]*)=(.*)$/.exec(state.group) ?? [];
    const grouping = data.groupings.findIndex(([one]) => one === name);
    const place = grouping < 0 ? -1 : data.groupings[grouping][1].indexOf(group);
    return place < 0 ? null : [grouping, place];
  };
  const inGroup = () => {
    const chosen = groupOf();
    return chosen ? (i) => examples.groups[i][chosen[0]] === chosen[1] : () => true;
  };

  const keyOf = (sort) => {
    const [kind, name] = sort.startsWith("change:") ? ["change", sort.slice(7)] : [sort, sort];
    const place = figures.indexOf(name);
    if (kind === "change" && other && place >= 0) {
      return (i) => (hasOther(i) ? examples.values[i][place] - other.values[i][place] : null);
    }
    if (place >= 0) return (i) => examples.values[i][place];
    if (kind === "probability") return (i) => examples.confidence[i];
    if (kind === "length") return length;
    return null;
  };
  const orders = new Map();
  const order = (sort) => {
    if (!orders.has(sort)) {
      const all = Array.from({ length: size }, (_, i) => i), key = keyOf(sort);
      if (sort === "id") {
        const collator = new Intl.Collator("en", { numeric: true });
        all.sort((a, b) => collator.compare(examples.id[a], examples.id[b]));
      } else if (key) {
        const keys = all.map((i) => key(i) ?? Infinity); // what is not known comes last
        all.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] - keys[b]));
      }
      orders.set(sort, all);
    }
    return orders.get(sort);
  };
  const chosen = () => {
    const tests = [isShown(), inGroup(), matches()];
    const found = order(state.sort).filter((i) => tests.every((test) => test(i)));
    return state.desc ? found.reverse() : found;
  };

  // ----------------------------------------------------------------------------------------- one example

  const named = (text, className = "") => element("span", text ? className : "nothing", text || data.nothing);

  // Parts of the text that the same marks cover. Places count characters, of which JavaScript may need two units each.
  const marked = (text, kinds) => {
    const characters = /[\ud800-\udfff]/.test(text) ? Array.from(text) : text;
    const part = (a, b) => (typeof characters === "string" ? characters.slice(a, b) : characters.slice(a, b).join(""));
    const all = Object.entries(kinds).flatMap(([kind, marks]) =>
      (marks ?? []).map(([start, end, label]) => ({ kind, start, end, label })),
    );
    const bounds = [...new Set([0, characters.length, ...all.flatMap(({ start, end }) => [start, end])])];
    bounds.sort((a, b) => a - b);
    const paragraph = element("p", "context");
    let before = new Set();
    for (let k = 0; k + 1 < bounds.length; k++) {
      const [start, end] = [bounds[k], bounds[k + 1]];
      const over = all.filter((mark) => mark.start <= start && mark.end >= end);
      const now = new Set(over.map(({ kind, label }) => TAGS[kind] + (label ? `: ${label}` : "")));
      if (over.length) {
        const node = element("mark", [...new Set(over.map(({ kind }) => kind))].join(" "), part(start, end));
        const begins = [...now].filter((tag) => !before.has(tag));
        if (begins.length) node.dataset.tag = begins.join(", ");
        paragraph.append(node);
      } else {
        paragraph.append(part(start, end));
      }
      before = now;
    }
    return paragraph;
  };
  const TAGS = { gold: "gold", predicted: other ? "this run" : "predicted", other: "other run" };

  const alternatives = (rows, text, caption) => {
    const characters = Array.from(text);
    const table = element("table"), body = element("tbody"), head = element("tr");
    table.append(element("caption", "unseen", caption));
    for (const [className, title] of [["", "prediction"], ["percent", "probability"], ["share", ""]]) {
      const header = element("th", className, title);
      header.scope = "col";
      if (!title) header.ariaHidden = "true";
      head.append(header);
    }
    table.append(element("thead"));
    table.tHead.append(head);
    for (const row of rows.slice(0, -1)) {
      const words = typeof row[1] === "string" ? row[1] : characters.slice(row[1], row[2]).join("");
      const line = element("tr"), share = cell("share", ""), bar = element("span", "bar");
      bar.style.width = `${100 * row[0]}%`;
      share.ariaHidden = "true";
      share.append(bar);
      const answer = cell("", "");
      answer.append(named(words));
      line.append(answer, cell("percent", `${(100 * row[0]).toFixed(1)} %`), share);
      body.append(line);
    }
    table.append(body);
    return table;
  };
  const listed = (rows, text, title) => {
    const parts = [element("h4", "", title), alternatives(rows, text, title)];
    const left = rows[rows.length - 1];
    if (left) parts.push(element("p", "small", `${counted(left)} less likely ones are not shown.`));
    return parts;
  };

  const told = (columns, i) => {
    const answer = element("dd");
    const shown = data.figures.map(([, name], k) => `${name} ${figure(columns.values[i][k])}`);
    if (columns.confidence[i] !== null) shown.push(`probability ${figure(100 * columns.confidence[i])} %`);
    answer.append(named(columns.predicted[i]), element("span", "small", shown.join(", ")));
    return answer;
  };
  const detail = (i) => {
    const row = element("tr", "detail"), all = cell("", ""), facts = element("dl");
    const gold = element("dd");
    examples.expected[i].forEach((text, k) => gold.append(k ? " · " : "", text));
    if (!examples.expected[i].length) gold.append(named(""));
    facts.append(element("dt", "", "Gold"), gold);
    facts.append(element("dt", "", other ? "This run" : "Predicted"), told(examples, i));
    if (hasOther(i)) {
      facts.append(element("dt", "", "Other run"), told(other, i));
      if (other.differs[i]) {
        facts.append(element("dt", "", "Note"), element("dd", "", "The other run had another text, or another gold."));
      }
    } else if (other) {
      facts.append(element("dt", "", "Other run"), element("dd", "nothing", "does not have this example"));
    }
    const groups = data.groupings.flatMap(([name, of], k) => of[examples.groups[i][k]] ?? []);
    const words = data.groupings.map(([name], k) => `${name}: ${data.groupings[k][1][examples.groups[i][k]] ?? "–"}`);
    if (groups.length) facts.append(element("dt", "", "Groups"), element("dd", "", words.join(" · ")));
    facts.append(element("dt", "", "Id"), element("dd", "", examples.id[i]));
    const text = texts[examples.text[i]];
    const kinds = { gold: examples.gold[i], predicted: examples.found[i], other: hasOther(i) ? other.found[i] : [] };
    const title = `${data.names[1][0].toUpperCase()}${data.names[1].slice(1)}, ${counted(length(i))} words`;
    all.append(facts, element("h4", "", title), marked(text, kinds));
    if (examples.alternatives[i].length > 1) {
      all.append(...listed(examples.alternatives[i], text, other ? "Most likely, this run" : "Most likely"));
    }
    if (hasOther(i) && other.alternatives[i].length > 1) {
      all.append(...listed(other.alternatives[i], text, "Most likely, other run"));
    }
    all.colSpan = [...byId("table").tHead.rows[0].cells].filter((one) => one.offsetWidth).length; // phones hide some
    row.append(all);
    return row;
  };

  // -------------------------------------------------------------------------------------------- the table

  const last = data.figures.length - 1; // the figure that tells most, beside whether an example is right
  const isSure = examples.confidence.some((one) => one !== null); // whether the task knows how sure it is
  const columns = [
    { className: "state", title: "", sort: figures[0] },
    { className: "", title: data.names[0], sort: "order" },
    { className: "answer", title: "predicted" },
    { className: "answer less", title: "gold" },
    { className: "number", title: data.figures[last]?.[1] ?? "", sort: figures[last] },
    ...(other ? [{ className: "number less", title: "change", sort: `change:${figures[last]}` }] : []),
    ...(isSure ? [{ className: "number less", title: "probability", sort: "probability" }] : []),
    { className: "number less", title: "words", sort: "length" },
  ];

  const row = (i) => {
    const isOpen = state.open === examples.id[i], made = element("tr", isOpen ? "opened" : "");
    const sign = cell(`state mark-${examples.right[i] ? "right" : "wrong"}`, examples.right[i] ? "✓" : "✗");
    sign.ariaLabel = examples.right[i] ? "right" : "wrong";
    const heading = cell("", ""), open = element("button", "open", examples.heading[i]);
    open.type = "button";
    open.dataset.place = i;
    open.ariaExpanded = String(isOpen);
    open.addEventListener("click", () => update({ open: isOpen ? "" : examples.id[i] }, i));
    heading.append(open);
    const predicted = cell("answer", ""), gold = cell("answer less", "");
    const brief = (text, className = "", before = "") => {
      const shown = element("span", `brief ${className}`, before);
      shown.append(named(text));
      return shown;
    };
    predicted.append(brief(examples.predicted[i]));
    if (hasOther(i) && other.predicted[i] !== examples.predicted[i]) {
      predicted.append(brief(other.predicted[i], "was", "other: "));
    }
    gold.append(brief(examples.expected[i][0] ?? ""));
    made.append(sign, heading, predicted, gold, cell("number", figure(examples.values[i][last])));
    if (other) {
      const change = hasOther(i) ? examples.values[i][last] - other.values[i][last] : null;
      const direction = change > 0 ? "better" : change < 0 ? "worse" : "same"; // null is neither
      const text = change === null ? "–" : change > 0 ? `+${figure(change)}` : figure(change).replace("-", "−");
      const shown = cell("number less", "");
      shown.append(element("span", direction, text));
      made.append(shown);
    }
    const confidence = examples.confidence[i];
    made.append(cell("number less", confidence === null ? "–" : `${figure(100 * confidence)} %`));
    made.append(cell("number less", counted(length(i))));
    return isOpen ? [made, detail(i)] : [made];
  };

  const header = () => {
    const line = byId("table").tHead.rows[0];
    line.replaceChildren(
      ...columns.map(({ className, title, sort }) => {
        const made = element("th", className);
        made.scope = "col";
        if (!sort || !title) {
          made.append(title || element("span", "unseen", "right or wrong"));
          return made;
        }
        const isOn = state.sort === sort, button = element("button", "", title);
        button.type = "button";
        if (isOn && sort !== "order") {
          made.ariaSort = state.desc ? "descending" : "ascending";
          button.append(state.desc ? " ↓" : " ↑");
        }
        button.addEventListener("click", () => {
          update({ sort, desc: isOn && !state.desc && sort !== "order" ? "1" : "", page: "1", open: "" });
          const place = columns.findIndex((one) => one.sort === sort && one.title);
          byId("table").tHead.rows[0].cells[place].firstChild.focus(); // the one that was there is gone
        });
        made.append(button);
        return made;
      }),
    );
  };

  const render = (toOpened = false) => {
    const found = chosen(), pages = Math.max(Math.ceil(found.length / PER_PAGE), 1);
    let page = Math.min(Math.max(Number.parseInt(state.page, 10) || 1, 1), pages);
    const opened = state.open ? found.findIndex((i) => examples.id[i] === state.open) : -1;
    if (opened >= 0 && toOpened) page = Math.floor(opened / PER_PAGE) + 1;
    state.page = String(page);
    header();
    const shown = found.slice((page - 1) * PER_PAGE, page * PER_PAGE);
    byId("table").tBodies[0].replaceChildren(...shown.flatMap(row));
    byId("count").textContent = `${counted(found.length)} of ${counted(size)} examples`;
    byId("page").textContent = `Page ${counted(page)} of ${counted(pages)}`;
    byId("back").disabled = page <= 1;
    byId("next").disabled = page >= pages;
    const group = groupOf() ? state.group.replace("=", ": ") : "";
    byId("group").hidden = !group;
    byId("group").textContent = `${group} ✕`;
    byId("group").ariaLabel = `Show all again, not only ${group}`;
    if (opened >= 0 && toOpened) document.querySelector(".opened")?.scrollIntoView();
  };

  // ------------------------------------------------------------------------------------ state and address

  let written = "";
  const write = () => {
    const isTold = ([name, value]) => value !== START[name] && !(name === "page" && state.open);
    const changed = Object.entries(state).filter(isTold);
    written = `#${new URLSearchParams(changed)}`;
    if (written !== location.hash && (written !== "#" || location.hash)) location.replace(written);
  };
  const fill = () => {
    byId("query").value = state.q;
    byId("show").value = state.show;
    byId("sort").value = state.sort;
    byId("descending").checked = Boolean(state.desc);
  };
  const update = (changes, focused = null) => {
    state = { ...state, ...changes };
    fill();
    render();
    write();
    if (focused !== null) {
      document.querySelector(`.open[data-place="${focused}"]`)?.focus({ preventScroll: true });
    }
  };
  const read = () => {
    if (location.hash === written || (written === "#" && !location.hash)) return;
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...START };
    for (const name of Object.keys(START)) if (given.has(name)) state[name] = given.get(name);
    const known = (id, value) => [...byId(id).options].some((option) => option.value === value);
    if (!known("show", state.show)) state.show = START.show;
    if (!known("sort", state.sort)) state.sort = START.sort;
    fill();
    render(true);
    if (location.hash && !document.querySelector(".opened")) byId("examples").scrollIntoView();
  };

  const choose = (id, kind, change) =>
    byId(id).addEventListener(kind, (event) => update({ ...change(event.target), page: "1", open: "" }));
  choose("query", "input", ({ value }) => ({ q: value }));
  choose("show", "change", ({ value }) => ({ show: value }));
  choose("sort", "change", ({ value }) => ({ sort: value }));
  choose("descending", "change", ({ checked }) => ({ desc: checked ? "1" : "" }));
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  byId("group").addEventListener("click", () => {
    update({ group: "", page: "1", open: "" });
    byId("query").focus();
  });
  for (const button of document.querySelectorAll("button.group")) {
    button.addEventListener("click", () => {
      update({ ...START, group: `${button.dataset.grouping}=${button.dataset.group}` });
      jump("examples");
    });
  }
  const turn = (by) => {
    update({ page: String(Number(state.page) + by), open: "" });
    byId("table").scrollIntoView();
  };
  byId("back").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", read);
  window.matchMedia("(max-width: 46rem)").addEventListener("change", () => render());
  written = null;
  read();
})();
