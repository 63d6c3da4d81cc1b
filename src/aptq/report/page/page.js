"use strict";
/* Draws what Python has prepared: a list of plots {id, kind, x, y, log, series}.  Every text comes
   from a run folder and is escaped, for Plotly reads some HTML tags in its texts. */
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const safe = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const lines = (hover) => hover.map((some) => some.map(safe).join("<br>"));
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const marks = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star"];
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    return { of, series: [0, 1, 2, 3, 4, 5, 6].map((n) => of(`s${n}`)), heat: of("heat").split(/\s+/) };
  };

  const axis = (look, title, more) => ({
    title: { text: safe(title), font: { size: 12 }, standoff: 8 },
    gridcolor: look.of("grid"), linecolor: look.of("line"), zeroline: false, automargin: true,
    fixedrange: true, tickfont: { size: 11 }, ...more,
  });

  const decades = (plot) => {
    const all = plot.series.flatMap((one) => one.y).filter((y) => y > 0).map(Math.log10);
    const span = Math.max(...all) - Math.min(...all);
    return { type: "log", dtick: span > 1.2 ? Math.ceil(span / 6) : "D2", exponentformat: "power" };
  };
  const whole = (values) => ({ tickformat: "d", dtick: Math.max(...values) > 12 ? 5 : 1, tick0: 0 });

  const kinds = {
    heat(plot, look, narrow) {
      const steps = look.heat.map((colour, n) => [n / (look.heat.length - 1), colour]);
      const wide = !narrow && plot.columns.length <= 40;
      const trace = {
        type: "heatmap", z: plot.z, x: plot.columns, y: plot.rows.map(safe), zmin: plot.low,
        zmax: plot.high, colorscale: steps, xgap: 1, ygap: 1, hoverongaps: false,
        text: plot.hover.map(lines), hovertemplate: "%{text}<extra></extra>",
        colorbar: {
          title: { text: safe(plot.unit), side: narrow ? "top" : "right", font: { size: 12 } },
          thickness: 10, outlinewidth: 0, tickfont: { size: 11 },
          ...(narrow ? { orientation: "h", y: -0.28, yanchor: "top", len: 1 } : { len: 1 }),
        },
      };
      const cells = wide ? { texttemplate: "%{z:.1f}", textfont: { size: 9 } } : {};
      return {
        data: [{ ...trace, ...(wide ? { ...cells, text: plot.z, customdata: trace.text, hovertemplate: "%{customdata}<extra></extra>" } : {}) }],
        layout: {
          height: 28 * plot.rows.length + (narrow ? 150 : 80),
          xaxis: axis(look, plot.x, { showgrid: false, ...whole(plot.columns) }),
          yaxis: axis(look, "", { autorange: "reversed", showgrid: false, ticks: "" }),
        },
      };
    },
    lines(plot, look, narrow) {
      const data = plot.series.map((one, n) => ({
        type: "scatter", mode: one.mode || "lines+markers", name: safe(one.name), x: one.x, y: one.y,
        text: one.hover ? lines(one.hover) : undefined,
        hovertemplate: one.hover ? "%{text}<extra></extra>" : "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        line: { color: look.series[(one.colour ?? n) % 7], width: 1.75, dash: dashes[one.dash || 0] },
        marker: {
          color: look.series[(one.colour ?? n) % 7], size: one.large ? 13 : 5,
          symbol: one.large ? "diamond" : marks[(one.colour ?? n) % 7],
          line: { color: look.of("ground"), width: one.large ? 2 : 0 },
        },
      }));
      const legend = { orientation: "h", y: -0.19, yanchor: "top", x: 0, font: { size: 12 } };
      return {
        data,
        layout: {
          height: plot.height || (narrow ? 340 : 360), showlegend: data.length > 1, legend,
          xaxis: axis(look, plot.x, plot.x === "block" ? whole(plot.series.flatMap((one) => one.x)) : plot.xlog ? { type: "log", dtick: 1 } : {}),
          yaxis: axis(look, plot.y, plot.log ? decades(plot) : { rangemode: "tozero" }),
          hovermode: "closest",
        },
      };
    },
    bars(plot, look) {
      return {
        data: [{
          type: "bar", orientation: "h", x: plot.values, y: plot.names.map(safe),
          text: plot.texts.map(safe), textposition: "auto", cliponaxis: false, hoverinfo: "skip",
          marker: { color: look.of("accent") }, insidetextfont: { color: look.of("ground") },
        }],
        layout: {
          height: 34 * plot.names.length + 60, bargap: 0.35,
          xaxis: axis(look, plot.x), yaxis: axis(look, "", { autorange: "reversed", ticks: "" }),
        },
      };
    },
  };

  const draw = () => {
    const look = colours();
    const jobs = plots.map((plot) => {
      const place = document.getElementById(plot.id);
      const narrow = place.clientWidth < 560;
      const { data, layout } = kinds[plot.kind](plot, look, narrow);
      const common = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
        margin: { l: 8, r: 8, t: 12, b: 8 }, width: place.clientWidth,
        font: { family: getComputedStyle(document.body).fontFamily, color: look.of("text"), size: 12 },
        hoverlabel: { bgcolor: look.of("panel"), bordercolor: look.of("line"), font: { color: look.of("text"), size: 12 }, align: "left" },
      };
      Plotly.purge(place);  // a colour bar that turns would leave its old ticks
      return Plotly.newPlot(place, data, { ...common, ...layout }, { displayModeBar: false, responsive: false });
    });
    return Promise.all(jobs).then(() => { document.body.dataset.drawn = String(jobs.length); });
  };

  let width = window.innerWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;  // phones resize when their bars go away
    clearTimeout(waiting);
    waiting = setTimeout(() => { width = window.innerWidth; draw(); }, 120);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
  draw();
})();
