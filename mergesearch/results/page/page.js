"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const narrow = () => window.innerWidth < 640;

  // --- colours: by name in the data, by the theme here ---
  const COLORED = new Set(["color", "fillcolor", "bgcolor", "bordercolor", "colorscale"]);
  const NAMED = /^@(ink|muted|grid|surface|good|bad|low|high|c[0-7])$/;
  let palette = {};
  const readPalette = () => {
    const style = getComputedStyle(document.documentElement);
    palette = {};
    for (const name of ["ink", "muted", "grid", "surface", "raised", "edge", "good", "bad", "low", "high",
      ...Array.from({ length: 8 }, (_, n) => "c" + n)]) palette[name] = style.getPropertyValue("--" + name).trim();
  };
  const painted = (value, under) => {
    if (typeof value === "string") {
      const found = under && NAMED.exec(value);
      return found ? palette[found[1]] : value;
    }
    if (Array.isArray(value)) return value.map((item) => painted(item, under));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, COLORED.has(key))]));
    }
    return value;
  };
  const themed = (layout, height) => {
    const result = painted(layout, false);
    const family = getComputedStyle(document.body).fontFamily;
    for (const key of Object.keys(result).filter((name) => /^[xy]axis/.test(name))) {
      result[key] = { gridcolor: palette.grid, zerolinecolor: palette.grid, linecolor: palette.grid, ...result[key] };
    }
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, height,
      margin: { l: 8, r: 14, t: 12, b: 36, pad: 2 }, dragmode: false, ...result,
      font: { family, size: 12, color: palette.ink, ...(result.font || {}) },
      hoverlabel: { bgcolor: palette.raised, bordercolor: palette.edge, font: { family, color: palette.ink, size: 12 }, align: "left", namelength: -1 },
    };
  };
  const OPTIONS = { displaylogo: false, responsive: true, displayModeBar: false };
  const drawing = [];
  const draw = (place, data, layout, height) => Plotly.react(place, painted(data, false), themed(layout, height), OPTIONS);

  // plotly reads some HTML in its texts
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shortened = (text, most) => escaped(text.length > most ? text.slice(0, most - 8) + "…" + text.slice(-7) : text);

  // --- pictures that are ready as they are ---
  const pictures = () => {
    for (const picture of read("pictures")) {
      const box = document.getElementById(picture.key);
      if (!box) continue;
      const place = one(".plot", box), buttons = one(".views", box);
      let shown = 0;
      const redraw = () => {
        const { data, layout, rows } = picture.views[shown], most = place.clientWidth < 560 ? 22 : 44;
        const yaxis = rows.length ? { ...layout.yaxis, ticktext: rows.map((row) => shortened(row, most)) } : layout.yaxis;
        return draw(place, data, { ...layout, yaxis }, picture.height);
      };
      if (buttons) picture.views.forEach((view, number) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = view.name;
        button.setAttribute("aria-pressed", String(number === 0));
        button.addEventListener("click", () => {
          shown = number;
          all("button", buttons).forEach((each, n) => each.setAttribute("aria-pressed", String(n === number)));
          redraw();
        });
        buttons.append(button);
      });
      drawing.push(redraw);
    }
  };

  // --- recipes by depth ---
  const maps = (box) => {
    const recipes = read(box.id + "-data"), choice = one("select", box), words = one(".words", box), room = one(".maps", box);
    recipes.forEach((recipe, number) => choice.append(new Option(recipe.label.length > 90 ? recipe.label.slice(0, 89) + "…" : recipe.label, number)));
    const redraw = () => {
      const recipe = recipes[choice.value || 0];
      words.textContent = recipe.words;
      all(".plot", room).forEach((old) => Plotly.purge(old));
      room.replaceChildren();
      const names = Object.keys(recipe.values);
      if (!names.length) {
        const none = document.createElement("p");
        none.className = "none";
        none.textContent = "This recipe has neither weights nor densities.";
        room.append(none);
      }
      const places = names.map(() => Object.assign(document.createElement("div"), { className: "plot" }));
      room.append(...places);  // all before any is drawn: their number decides how wide each is
      names.forEach((name, number) => {
        const [data, layout, height] = heat(recipe, name, places[number].clientWidth);
        draw(places[number], data, layout, height);
      });
    };
    choice.addEventListener("change", redraw);
    drawing.push(redraw);
  };
  const heat = (recipe, name, width) => {
    const values = recipe.values[name], flat = values.flat(2).filter((value) => value !== null);
    const most = Math.max(1e-9, ...flat.map(Math.abs)), negative = flat.some((value) => value < 0);
    const scale = name === "density" ? { zmin: 0, zmax: 1 } : { zmin: negative ? -most : 0, zmax: most };
    const colors = negative ? [[0, "@low"], [0.5, "@surface"], [1, "@high"]] : [[0, "@surface"], [1, "@high"]];
    const layers = recipe.edges[recipe.edges.length - 1];
    const columns = recipe.edges.slice(0, -1).map((first, n) => {
      const last = recipe.edges[n + 1] - 1;
      return layers === 1 || (first === 0 && last === layers - 1) ? "all layers" : first === last ? `layer ${first}` : `layers ${first}-${last}`;
    });
    const rowHeight = Math.max(22, Math.min(34, 150 / recipe.rows.length)), gap = 30;
    const each = recipe.rows.length * rowHeight, height = recipe.models.length * (each + gap) + 70;
    const plot = height - 70, data = [], annotations = [{
      text: `<b>${escaped(name)}</b>`, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "paper", yanchor: "bottom", yshift: 8, showarrow: false,
    }], layout = { margin: { l: 8, r: 8, t: 34, b: 36 }, annotations };
    const digits = columns.length * 44 < width - 130;
    recipe.models.forEach((model, number) => {
      const suffix = number ? String(number + 1) : "", top = 1 - (number * (each + gap) + gap - 8) / plot;
      const numbers = values[number].map((row) => row.map((value) => value === null ? "" : String(Number(value.toPrecision(2)))));
      data.push({
        type: "heatmap", z: values[number], x: recipe.edges, y: Array.from({ length: recipe.rows.length + 1 }, (_, n) => n), ...scale,
        colorscale: colors, xgap: 1, ygap: 1, xaxis: "x", yaxis: "y" + suffix, showscale: number === 0,
        text: digits ? numbers : undefined, texttemplate: digits ? "%{text}" : undefined, textfont: { size: 11 },
        customdata: recipe.rows.map((row) => columns.map((column) => `${escaped(model)}<br>${escaped(row)}, ${column}`)),
        hovertemplate: "%{customdata}<br>" + name + " %{z}<extra></extra>", hoverongaps: false,
        colorbar: { orientation: "h", thickness: 8, len: 0.45, x: 1, xanchor: "right", y: 1, yanchor: "bottom", ypad: 2, tickfont: { size: 10 }, nticks: narrow() ? 3 : 5 },
      });
      layout["yaxis" + suffix] = {
        domain: [Math.max(0, top - each / plot), top], range: [recipe.rows.length, 0], tickmode: "array", showgrid: false, zeroline: false,
        tickvals: recipe.rows.map((_, n) => n + 0.5), ticktext: recipe.rows.map((row) => shortened(row, narrow() ? 16 : 24)), automargin: true, fixedrange: true, anchor: "x",
      };
      annotations.push({
        text: shortened(model, 40), x: 0, xref: "paper", xanchor: "left", y: top, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 12, color: "@muted" },
      });
    });
    layout.xaxis = {
      range: [0, layers], fixedrange: true, showgrid: false, zeroline: false, anchor: "y" + (recipe.models.length > 1 ? recipe.models.length : ""),
      ...(columns.length === 1 ? { tickmode: "array", tickvals: [layers / 2], ticktext: [columns[0]] } : layers <= 16
        ? { tickmode: "array", tickvals: Array.from({ length: layers }, (_, n) => n + 0.5), ticktext: Array.from({ length: layers }, (_, n) => String(n)), title: { text: "layer" } }
        : { title: { text: "layer" } }),
    };
    return [data, layout, height];
  };

  // --- trade-offs ---
  const KINDS = { parent: ["@c5", "square", "parents"], baseline: ["@c7", "circle", "baselines"], proposal: ["@c1", "circle", "proposals"], winner: ["@c0", "star", "winner"] };
  const trades = (box) => {
    const given = read(box.id + "-data"), place = one(".plot", box), across = one("select.x", box), up = one("select.y", box);
    given.tasks.forEach((task, number) => {
      across.append(new Option(task.name.slice(0, 90), number));
      up.append(new Option(task.name.slice(0, 90), number));
    });
    across.value = given.first;
    up.value = given.second;
    const redraw = () => {
      const [i, j] = [Number(across.value), Number(up.value)], xs = given.values[i], ys = given.values[j];
      const signs = [given.tasks[i].up ? 1 : -1, given.tasks[j].up ? 1 : -1];
      const told = (n) => `${given.labels[n]}<br>${given.tasks[i].title} ${fixed(xs[n])}<br>${given.tasks[j].title} ${fixed(ys[n])}`;
      const order = xs.map((_, n) => n).filter((n) => xs[n] !== null && ys[n] !== null)
        .sort((a, b) => signs[0] * (xs[b] - xs[a]) || signs[1] * (ys[b] - ys[a]));
      const front = [];
      let reached = -Infinity;
      for (const n of order) if (signs[1] * ys[n] > reached) { reached = signs[1] * ys[n]; front.push(n); }
      const data = [{ type: "scatter", mode: "lines", name: "Pareto front of the two", x: front.map((n) => xs[n]), y: front.map((n) => ys[n]), line: { color: "@muted", width: 1.5, shape: "hv", dash: "dot" }, hoverinfo: "skip" }];
      for (const [kind, [color, symbol, name]] of Object.entries(KINDS)) {
        const mine = order.filter((n) => given.kinds[n] === kind);
        if (mine.length) data.push({
          type: "scatter", mode: "markers", name, x: mine.map((n) => xs[n]), y: mine.map((n) => ys[n]), text: mine.map(told), hovertemplate: "%{text}<extra></extra>",
          marker: { color, symbol, size: kind === "winner" ? 14 : 8, opacity: 0.9, line: { color: "@ink", width: mine.map((n) => given.front[n] ? 1.6 : 0) } },
        });
      }
      const axis = (task) => ({ title: { text: task.title + (task.up ? "" : ", lower is better") }, automargin: true, fixedrange: true, zeroline: false });
      draw(place, data, { xaxis: axis(given.tasks[i]), yaxis: axis(given.tasks[j]), hovermode: "closest", legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" } }, 460);
    };
    const fixed = (value) => value === null ? "-" : value.toFixed(4);
    for (const choice of [across, up]) choice.addEventListener("change", redraw);
    drawing.push(redraw);
  };

  // --- tables, copying ---
  const sortable = (table) => all("thead th", table).forEach((head, column) => one("button", head).addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    all("thead th", table).forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const by = (row) => row.cells[column].dataset.by, body = table.tBodies[0];
    const compared = (a, b) => {
      const [one, other] = [by(a), by(b)];
      if (one === "" || other === "") return (one === "") - (other === "");
      const difference = one !== "" && !isNaN(one) && !isNaN(other) ? one - other : one < other ? -1 : one > other ? 1 : 0;
      return down ? -difference : difference;
    };
    body.append(...[...body.rows].sort(compared));
  }));
  const copying = (button) => button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.of);
    let done = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      done = true;
    } catch {
      const area = document.createElement("textarea");
      area.value = source.textContent;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Select it and copy";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  // --- plotly, unpacked ---
  const unpacked = async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("library").textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const begin = async () => {
    all(".copy").forEach(copying);
    all("table.sortable").forEach(sortable);
    try {
      await unpacked();
      readPalette();
      pictures();
      all(".depth").forEach(maps);
      all(".tradeoffs").forEach(trades);
      for (const redraw of drawing) await redraw();
      const again = () => { readPalette(); for (const redraw of drawing) redraw(); };
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
      matchMedia("(max-width: 640px)").addEventListener("change", again);
      document.documentElement.dataset.drawn = "yes";
    } catch (error) {
      const notice = document.getElementById("trouble");
      notice.textContent = "The pictures could not be drawn (" + error + "): a browser of 2023 or later draws them. Tables and texts are all here.";
      notice.hidden = false;
      throw error;
    }
  };
  begin();
})();
