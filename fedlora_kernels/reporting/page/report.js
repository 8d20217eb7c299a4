"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const chosen = id => Number(at(id)?.value || 0);
  // plotly reads texts as HTML of its own
  const safe = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, most) => text.length <= most ? text : "\u2026" + text.slice(text.length - most + 1);
  const narrow = () => window.innerWidth < 600;
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const palette = () => dark() ? ["#58c4c6", "#f0a063", "#b79ce8", "#8fd18b", "#f08cae", "#9fb8c8", "#d9c75c", "#86a8f2"]
    : ["#0b6e74", "#b8561b", "#6b4fa0", "#2f7d32", "#a32f5d", "#51707f", "#8a7a00", "#3f6fd1"];
  const charts = {};

  function options(select, entries) {
    const groups = new Map();
    entries.forEach(([group, text], value) => {
      const option = new Option(text, value);
      if (!group) { select.append(option); return; }
      if (!groups.has(group)) {
        const made = document.createElement("optgroup");
        made.label = group;
        groups.set(group, made);
        select.append(made);
      }
      groups.get(group).append(option);
    });
  }

  function layout(more) {
    const ink = style("--ink"), muted = style("--muted"), grid = style("--grid");
    const axis = { color: muted, gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, ticks: "", tickfont: { size: narrow() ? 10 : 11 } };
    const { xaxis = {}, yaxis = {}, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12, color: ink },
      margin: { l: 8, r: 8, t: 8, b: 8 }, dragmode: false, hoverlabel: { align: "left", bgcolor: style("--card"), bordercolor: style("--line"), font: { color: ink } },
      showlegend: false, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }
  const bar = title => ({ thickness: 10, outlinewidth: 0, tickfont: { size: 10, color: style("--muted") }, title: { text: title, side: "right", font: { size: 11, color: style("--muted") } } });
  const dark = () => window.matchMedia("(prefers-color-scheme: dark)").matches && !window.matchMedia("print").matches;
  const rising = () => dark() ? [[0, "#1c2a2e"], [.25, "#1d4b52"], [.5, "#21767a"], [.75, "#58b79a"], [1, "#e8f3a8"]]
    : [[0, "#eef4f2"], [.25, "#b5dbd2"], [.5, "#5fb0ab"], [.75, "#1d757d"], [1, "#0b3a4a"]];
  const diverging = () => dark() ? [[0, "#f0a063"], [.25, "#80512c"], [.5, "#20272d"], [.75, "#2b6f72"], [1, "#7fe0e0"]]
    : [[0, "#a84a12"], [.25, "#e9b48d"], [.5, "#f4f2ee"], [.75, "#7fbfbf"], [1, "#0b5f66"]];

  // where modules of one kind begin and end, on an axis of all modules
  function kinds(most) {
    const runs = data.map.kinds, shown = runs.filter(([, , count]) => runs.length <= 24 || count > data.modules.length / 40);
    return { tickmode: "array", tickvals: shown.map(([, first, count]) => first + (count - 1) / 2), ticktext: shown.map(([row]) => safe(short(data.map.rows[row], most))) };
  }
  const borders = axis => data.map.kinds.slice(1).map(([, first]) => ({ type: "line", [`${axis}0`]: first - .5, [`${axis}1`]: first - .5, [`${axis === "x" ? "y" : "x"}ref`]: "paper", [axis === "x" ? "y0" : "x0"]: 0, [axis === "x" ? "y1" : "x1"]: 1, line: { color: style("--card"), width: 1.5 } }));

  function show(id, traces, more, height) {
    const place = at(id);
    place.style.minHeight = `${height}px`;
    return Plotly.react(place, traces, layout({ height, ...more }), { displayModeBar: false, responsive: true, showTips: false });
  }

  charts.map = () => {
    const { rows, columns, grids } = data.map, grid = grids[chosen("map-of")];
    if (!grid) return null;
    const labels = rows.map(row => safe(narrow() ? short(row, 16) : short(row, 44)));
    const lone = columns.length === 1 && columns[0] === "";
    const traces = [{
      type: "heatmap", z: grid.values, x: columns.map(column => column === "" ? "other" : column), y: labels.map((_, i) => i), customdata: rows.map(row => columns.map(() => safe(row))),
      xgap: 1, ygap: 1, colorscale: rising(), colorbar: bar(""), hoverongaps: false,
      hovertemplate: (lone ? "" : "layer %{x}<br>") + "%{customdata}<br><b>%{z:.4~g}</b><extra></extra>",
    }];
    return show("map", traces, {
      xaxis: { type: "category", showgrid: false, title: { text: lone ? "" : "layer", font: { size: 11 } }, showticklabels: !lone },
      yaxis: { autorange: "reversed", showgrid: false, tickmode: "array", tickvals: labels.map((_, i) => i), ticktext: labels },
    }, Math.min(1100, Math.max(220, 90 + 30 * rows.length)));
  };

  charts.spectra = () => {
    const series = data.spectra[chosen("spectra-of")];
    const most = Math.max(1, ...series.values.map(values => (values || []).length));
    const z = series.values.map(values => Array.from({ length: most }, (_, i) => values && i < values.length ? Math.log10(values[i] / values[0]) : null));
    const traces = [{
      type: "heatmap", z, x: z[0].map((_, i) => i + 1), customdata: data.modules.map(name => Array(most).fill(safe(name))), zmax: 0, zmin: Math.max(-6, Math.min(-1, ...z.flat().filter(value => value !== null))),
      colorscale: rising(), colorbar: { ...bar("s / largest s"), tickmode: "array", tickvals: [0, -1, -2, -3, -4, -5, -6], ticktext: ["1", "0.1", "0.01", "1e-3", "1e-4", "1e-5", "1e-6"] },
      hoverongaps: false, hovertemplate: "%{customdata}<br>singular value %{x}<br>10^%{z:.2f} of the largest<extra></extra>",
    }];
    if (data.ranks) {
      traces.push({
        type: "scatter", mode: "lines", x: data.ranks.map(rank => rank + .5), y: data.modules.map((_, i) => i), line: { color: style("--second"), width: 1.6, shape: "vh" },
        customdata: data.modules.map(safe), hovertemplate: "%{customdata}<br>rank kept: %{text}<extra></extra>", text: data.ranks.map(String),
      });
    }
    return show("spectra", traces, {
      xaxis: { title: { text: "singular value number", font: { size: 11 } }, showgrid: false },
      yaxis: { range: [data.modules.length - .5, -.5], showgrid: false, ...kinds(narrow() ? 14 : 24) }, shapes: borders("y"),
    }, Math.min(440, Math.max(narrow() ? 260 : 420, 100 + 12 * data.modules.length)));
  };

  charts.spectrum = () => {
    const index = chosen("spectrum-of"), rank = data.ranks && data.ranks[index];
    const many = data.spectra.length > 1, traces = [];
    data.spectra.forEach((series, k) => {
      const values = series.values[index];
      if (!values || !values.length) return;
      const last = many && k === data.spectra.length - 1 && series.name === "weighted sum";
      const kept = rank === null || rank === undefined ? values.length : rank;
      traces.push({
        type: "scatter", mode: last ? "lines" : "lines+markers", x: values.map((_, i) => i + 1), y: values, name: safe(short(series.name, 28)),
        line: { width: last ? 3 : 1.6, color: many ? (last ? style("--ink") : palette()[k % 8]) : style("--accent") },
        marker: { size: last ? 0 : 5, color: many ? palette()[k % 8] : values.map((_, i) => style(i < kept ? "--accent" : "--muted")) },
        hovertemplate: "%{fullData.name}<br>number %{x}<br><b>%{y:.4~g}</b><extra></extra>",
      });
    });
    const shown = traces.flatMap(trace => trace.y), wide = Math.max(...shown) > 100 * Math.min(...shown);
    const cut = rank && traces.length ? [{ type: "line", x0: rank + .5, x1: rank + .5, yref: "paper", y0: 0, y1: 1, line: { color: style("--second"), width: 2, dash: "dot" } }] : [];
    const told = cut.length ? [{ x: rank + .5, yref: "paper", y: 1, text: `rank ${rank} kept`, showarrow: false, xanchor: "left", yanchor: "top", font: { size: 11, color: style("--second") } }] : [];
    return show("spectrum", traces, {
      showlegend: many && traces.length <= 12, legend: { orientation: "h", y: -.2, font: { size: 11 } }, shapes: cut, annotations: told,
      xaxis: { title: { text: "singular value number", font: { size: 11 } }, rangemode: "tozero" },
      yaxis: { type: "log", exponentformat: "power", dtick: wide ? 1 : "D2" },
    }, 440);
  };

  charts.lost = () => {
    const whole = data.lost.map(value => value === null ? null : 100 * value);
    const traces = [{
      type: "bar", x: whole.map((_, i) => i), y: whole, marker: { color: style("--accent") }, customdata: data.modules.map((name, i) => [safe(name), data.bound[i] === null ? "unknown" : (100 * data.bound[i]).toPrecision(4) + " %"]),
      hovertemplate: "%{customdata[0]}<br><b>%{y:.3~g} %</b> of its energy lost<br>certified at most %{customdata[1]}<extra></extra>",
    }];
    return show("lost", traces, { bargap: .15, shapes: borders("x"), xaxis: { range: [-.5, whole.length - .5], showgrid: false, ...kinds(narrow() ? 12 : 22) }, yaxis: { ticksuffix: " %", rangemode: "tozero" } }, 280);
  };

  charts.norms = () => {
    const count = data.clients.length, most = narrow() ? 12 : 26, sent = data.clients.map(name => data.sent[name] ?? null);
    const labels = data.clients.map(name => safe(short(name, most)));
    const traces = [{ type: "bar", orientation: "h", y: labels.map((_, i) => i), x: data.norms, name: "as it counts", marker: { color: style("--accent") }, customdata: data.clients.map(safe), hovertemplate: "%{customdata}<br>norm <b>%{x:.4~g}</b><extra></extra>" }];
    if (sent.some(value => value !== null)) {
      traces.push({ type: "scatter", mode: "markers", y: labels.map((_, i) => i), x: sent, name: "as sent", marker: { color: style("--second"), symbol: "line-ns-open", size: 14, line: { width: 3 } }, customdata: data.clients.map(safe), hovertemplate: "%{customdata}<br>sent with norm <b>%{x:.4~g}</b>, clipped<extra></extra>" });
    }
    return show("norms", traces, {
      bargap: .35, showlegend: traces.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { rangemode: "tozero", title: { text: "norm of the update", font: { size: 11 } } },
      yaxis: { autorange: "reversed", showgrid: false, tickmode: "array", tickvals: count > 60 ? [] : labels.map((_, i) => i), ticktext: labels },
    }, Math.min(900, Math.max(narrow() ? 220 : 300, 110 + 26 * count)));
  };

  charts.cosines = () => {
    const entry = cosines[chosen("cosines-of")];
    const count = data.clients.length, most = narrow() ? 9 : 18, ticks = data.clients.map((_, i) => i);
    const labels = data.clients.map(name => safe(short(name, most)));
    const few = count <= (narrow() ? 6 : 12);
    const traces = [{
      type: "heatmap", z: entry[1], x: ticks, y: ticks, zmin: -1, zmax: 1, colorscale: diverging(), colorbar: bar(""), xgap: 1, ygap: 1,
      customdata: data.clients.map(a => data.clients.map(b => `${safe(a)}<br>${safe(b)}`)), hovertemplate: "%{customdata}<br>cosine <b>%{z:.4f}</b><extra></extra>",
      ...(few ? { texttemplate: "%{z:.2f}", textfont: { size: narrow() ? 9 : 11 } } : {}),
    }];
    const axis = { showgrid: false, tickmode: "array", tickvals: count > 60 ? [] : ticks, ticktext: labels };
    return show("cosines", traces, { xaxis: { ...axis, tickangle: -40 }, yaxis: { ...axis, autorange: "reversed" } }, Math.min(820, Math.max(280, 140 + 26 * count)));
  };

  charts.sizes = () => {
    const [names, before, after] = data.sizes, at = names.map((_, i) => i), labels = names.map(name => safe(short(name, narrow() ? 12 : 26)));
    const bars = (values, name, colour) => ({ type: "bar", orientation: "h", y: at, x: values.map(bytes => bytes / 1048576), name, marker: { color: style(colour) }, customdata: names.map(safe), hovertemplate: `%{customdata}<br>${name} <b>%{x:.3~g} MiB</b><extra></extra>` });
    return show("sizes", [bars(before, "before", "--line"), bars(after, "after", "--accent")], {
      barmode: "group", bargap: .3, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, xaxis: { rangemode: "tozero", ticksuffix: " MiB" },
      yaxis: { autorange: "reversed", showgrid: false, tickmode: "array", tickvals: names.length > 60 ? [] : at, ticktext: labels },
    }, Math.min(1100, Math.max(220, 110 + 34 * names.length)));
  };

  const cosines = [];
  if (data.cosines) cosines.push(["Whole model", data.cosines]);
  (data.cosines_of || []).forEach((values, i) => { if (values) cosines.push([data.modules[i], values]); });

  function fill() {
    const chooser = {
      "map-of": data.map.grids.map(grid => [grid.group, grid.label]),
      "spectra-of": data.spectra.map(series => ["", series.name]),
      "spectrum-of": data.modules.map(name => ["", name]),
      "cosines-of": cosines.map(([name]) => ["", name]),
    };
    for (const [id, entries] of Object.entries(chooser)) {
      if (!at(id)) continue;
      options(at(id), entries);
      at(id).addEventListener("change", charts[id.split("-")[0]]);
    }
    for (const button of document.querySelectorAll("button[data-step]")) {
      button.addEventListener("click", () => {
        const select = at("spectrum-of");
        select.selectedIndex = (select.selectedIndex + Number(button.dataset.step) + select.options.length) % select.options.length;
        charts.spectrum();
      });
    }
  }

  const draw = () => Promise.all(Object.keys(charts).filter(at).map(name => charts[name]()));

  async function library() {
    const packed = Uint8Array.from(atob(at("plotly").textContent), char => char.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") {
      document.querySelectorAll(".chart").forEach(chart => { chart.textContent = "Charts need a browser of 2023 or newer; the numbers stand in the tables."; });
      return;
    }
    fill();
    await library();
    await draw();
    document.documentElement.dataset.drawn = "true";
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    let before = narrow();
    window.addEventListener("resize", () => { if (narrow() !== before) { before = narrow(); draw(); } });
    window.addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach(part => { part.open = true; }); draw(); });
    window.addEventListener("afterprint", draw);
  }
  start();
})();
