document.querySelectorAll(".plot").forEach(function (plot) {
  var data = JSON.parse(plot.dataset.points), frame = plot.querySelector(".frame");
  var cursor = plot.querySelector(".cursor"), read = plot.querySelector(".read"), at = null;
  function nearest(points, x) {
    return points.reduce(function (best, point) {
      return Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best;
    });
  }
  function show(x) {
    at = Math.max(0, Math.min(1000, x));
    var found = data.series.map(function (series) { return [series.name, nearest(series.points, at)]; });
    cursor.hidden = false;
    cursor.style.left = found[0][1][0] / 10 + "%";
    read.textContent = data.x + " " + found[0][1][2] + ": " + found.map(function (pair) {
      return (found.length > 1 ? pair[0] + " " : "") + pair[1][3];
    }).join(", ");
  }
  function hide() { cursor.hidden = true; read.textContent = ""; at = null; }
  plot.addEventListener("pointermove", function (event) {
    var box = frame.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * 1000);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", function (event) {
    var move = { ArrowLeft: -10, ArrowRight: 10, PageUp: -100, PageDown: 100 }[event.key];
    if (event.key === "Escape") { hide(); return; }
    var place = { Home: 0, End: 1000 }[event.key];
    if (place === undefined && !move) { return; }
    event.preventDefault();
    if (place === undefined) { place = at === null ? (move > 0 ? 0 : 1000) : at + move; }
    show(place);
  });
});
