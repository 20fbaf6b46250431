package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// limit is how much of its mean the resident memory may grow in an hour.
const limit = 0.01

// judgeFrom is the shortest time after warm-up from which a trend of memory is judged at all: before, caches still fill.
const judgeFrom = 10 * time.Minute

// Verdict is one thing that was promised, and whether it held.
type Verdict struct {
	What   string `json:"what"`
	Result string `json:"result"` // ok, failed or undecided
	Why    string `json:"why"`
}

// The results.
const (
	ok        = "ok"
	failed    = "failed"
	undecided = "undecided"
)

// Trend is a straight line through measurements, by least squares: how steep it is, and between which bounds its slope lies with
// 95 % confidence. Slopes are per hour and as parts of the mean. Neighbouring measurements resemble each other, so they count
// for less than their number: the interval is widened by their lag-1 correlation.
type Trend struct {
	Mean    float64 `json:"mean"`
	PerHour float64 `json:"per_hour"`
	Low     float64 `json:"low"`
	High    float64 `json:"high"`
	Points  int     `json:"points"`
}

// trend fits a line through y over t. With fewer than five points or no spread in time nothing is known: bounds are infinite.
func trend(t []time.Duration, y []float64) Trend {
	n := float64(len(y))
	out := Trend{Points: len(y), Low: math.Inf(-1), High: math.Inf(1)}
	var sumT, sumY float64
	for i := range y {
		sumT += t[i].Hours()
		sumY += y[i]
	}
	if len(y) == 0 || sumY == 0 {
		return out
	}
	meanT, meanY := sumT/n, sumY/n
	out.Mean = meanY
	var stt, sty float64
	for i := range y {
		dt := t[i].Hours() - meanT
		stt += dt * dt
		sty += dt * (y[i] - meanY)
	}
	if len(y) < 5 || stt == 0 {
		return out
	}
	slope := sty / stt
	residual := make([]float64, len(y))
	var square, lagged float64
	for i := range y {
		residual[i] = y[i] - meanY - slope*(t[i].Hours()-meanT)
		square += residual[i] * residual[i]
		if i > 0 {
			lagged += residual[i] * residual[i-1]
		}
	}
	wider := 1.0
	if square > 0 {
		r := min(max(lagged/square, 0), 0.9)
		wider = math.Sqrt((1 + r) / (1 - r))
	}
	half := student(n-2) * wider * math.Sqrt(square/(n-2)/stt)
	out.PerHour, out.Low, out.High = slope/meanY, (slope-half)/meanY, (slope+half)/meanY
	return out
}

// student is the 97.5 % quantile of Student's t with f degrees of freedom, by the first terms of its expansion about the normal
// one (Abramowitz and Stegun 26.7.5): within 2 % from three degrees on.
func student(f float64) float64 {
	return 1.96 + 2.37/f + 2.82/(f*f) + 2.56/(f*f*f)
}

// growth judges a trend of memory over a time against limit. It fails only if the growth is certain, and passes only if its
// absence is; in between it says what the run could have told.
func growth(what string, tr Trend, over time.Duration) Verdict {
	v := Verdict{What: fmt.Sprintf("%s grows less than %.0f %% an hour", what, limit*100)}
	half := (tr.High - tr.Low) / 2
	v.Why = fmt.Sprintf("%+.1f %%/h, 95 %% sure of %+.1f to %+.1f, over %v after warm-up",
		tr.PerHour*100, tr.Low*100, tr.High*100, over.Round(time.Second))
	switch {
	case over < judgeFrom || math.IsInf(half, 0):
		v.Result = undecided
		v.Why = fmt.Sprintf("%v after warm-up are too short to judge; at least %v are wanted", over.Round(time.Second), judgeFrom)
	case tr.Low > limit:
		v.Result = failed
	case tr.High < limit:
		v.Result = ok
	default:
		// The uncertainty of a slope falls with the time to the power of 1.5.
		need := time.Duration(float64(over) * math.Pow(half/(limit/2), 2.0/3)).Round(time.Minute)
		v.Result = undecided
		v.Why += fmt.Sprintf("; a run of this length and noise tells slopes of %.1f %%/h and more; to tell %.1f it would take about %v",
			half*100, limit*100/2, need)
	}
	return v
}

// level judges a count that should not grow: what it mostly is at the end may exceed what it mostly was at first by slack.
func level(what string, y []float64, slack float64) Verdict {
	v := Verdict{What: what + " are flat", Result: ok}
	if len(y) < 4 {
		v.Result, v.Why = undecided, fmt.Sprintf("%d measurements are too few", len(y))
		return v
	}
	quarter := len(y) / 4
	first, last := median(y[:quarter]), median(y[len(y)-quarter:])
	v.Why = fmt.Sprintf("%.0f at first, %.0f at the end, %.0f to %.0f in between", first, last, slices.Min(y), slices.Max(y))
	if last > first+slack {
		v.Result = failed
	}
	return v
}

// bounded judges the largest of some measurements against what is stated for each.
func bounded(what string, got, most []float64) Verdict {
	v := Verdict{What: what + " are within their bound", Result: ok}
	worst := 0
	for i := range got {
		if got[i]-most[i] > got[worst]-most[worst] {
			worst = i
		}
	}
	if len(got) == 0 {
		v.Result, v.Why = undecided, "nothing was measured"
		return v
	}
	v.Why = fmt.Sprintf("nearest to it: %.0f of %.0f", got[worst], most[worst])
	if got[worst] > most[worst] {
		v.Result = failed
	}
	return v
}

func median(y []float64) float64 {
	s := slices.Sorted(slices.Values(y))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
