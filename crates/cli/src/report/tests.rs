//! A report made up for tests, and what every form must show of it.

use super::*;
use lacuna::compare::report::{
    Cost, Machine, Measured, ModelFacts, Point, Quality, REPORT_VERSION, SiteKept, Speed, TextFacts,
};

/// A model name that breaks pages which do not escape.
pub const HOSTILE: &str = "<script>alert('x')</script>&\"|";

/// Four points of two families: dense, two of one, one of the other with a gap in its kept shares.
pub fn sample() -> Report {
    let m = |value, error| Measured { value, error };
    let point = |label: &str, family: &str, value, bits: f64, bytes: f64, ms: f64| Point {
        key: label.into(),
        label: label.into(),
        family: family.into(),
        value,
        command: format!("lacuna run --sparse {label}"),
        quality: Quality {
            ppl: m(4.0 * bits, 0.125),
            bits_per_byte: m(bits, 0.25),
            change: m(bits - 1.0, 0.0625),
            kld: m(bits - 1.0, 0.03125),
            kld_p99: 2.0 * (bits - 1.0),
            same_top: m(2.0 - bits, 0.0625),
        },
        task: None,
        cost: Cost {
            bytes_per_token: bytes,
            weight_bytes_per_token: bytes,
            copies_bytes: 1 << 20,
            kept: match label {
                "dense" => vec![],
                _ => vec![SiteKept { site: "attn.q inputs".into(), layers: vec![Some(0.5), None] }],
            },
        },
        speed: Some(Speed { samples: vec![1e3 / ms; 3], quartiles: [1e3 / ms; 3], speedup: [2.0 / ms; 3] }),
        notes: vec![],
    };
    Report {
        version: REPORT_VERSION,
        program: "0.0".into(),
        date: "2026-01-01 00:00 UTC".into(),
        command: format!("lacuna compare '{HOSTILE}'"),
        seed: 7,
        machine: Machine {
            cpu: "a processor".into(),
            isa: "scalar".into(),
            cores: 2,
            threads: 1,
            cache_bytes: None,
            stream_gb_per_s: Some([10.0, 12.0]),
            load: None,
        },
        model: ModelFacts {
            name: HOSTILE.into(),
            hash: "0123456789abcdef".into(),
            architecture: "test".into(),
            parameters: 1000,
            bytes: 2000,
            layers: 2,
            kv: "f16".into(),
        },
        text: TextFacts {
            file: "text.txt".into(),
            sha256: "fedcba".into(),
            tokens: 100,
            bytes: 400,
            windows: 2,
            cut: "chunks".into(),
            calibration: None,
        },
        task: None,
        protocol: vec!["a rule".into()],
        dense: point("dense", "dense", None, 1.0, 4e6, 2.0),
        points: vec![
            point("one=0.25", "one", Some(0.25), 1.125, 3e6, 1.5),
            point("one=0.5", "one", Some(0.5), 1.5, 2e6, 1.0),
            point("two", "two", None, 1.75, 3.5e6, 4.0),
        ],
        notes: vec!["mind the gap".into()],
    }
}

#[test]
fn json_reads_back_the_same() {
    let text = serde_json::to_vec_pretty(&sample()).unwrap();
    assert_eq!(Report::parse(&text), Some(sample()));
    assert_eq!(Report::parse(&text[..text.len() / 2]), None);
    let other = Report { version: REPORT_VERSION + 1, ..sample() };
    assert_eq!(Report::parse(&serde_json::to_vec(&other).unwrap()), None);
}

#[test]
fn csv_reads_back_the_same() {
    let text = csv::rows(&sample());
    let rows: Vec<Vec<String>> =
        text.lines().map(|l| l.split(',').map(|c| c.trim_matches('"').to_owned()).collect()).collect();
    assert!(rows.iter().all(|r| r.len() == rows[0].len()) && rows.len() == 5, "{text}");
    let get = |row: usize, column: &str| {
        let at = rows[0].iter().position(|c| c == column).unwrap();
        rows[row][at].parse::<f64>().ok()
    };
    for (i, p) in sample().all().enumerate() {
        assert_eq!(rows[i + 1][0], p.label);
        assert_eq!(get(i + 1, "bits_per_byte"), Some(p.quality.bits_per_byte.value));
        assert_eq!(get(i + 1, "change_error"), Some(p.quality.change.error));
        assert_eq!(get(i + 1, "bytes_per_token"), Some(p.cost.bytes_per_token));
        assert_eq!(get(i + 1, "tokens_per_s"), p.speed.as_ref().map(|s| s.quartiles[1]));
        assert_eq!(get(i + 1, "task_accuracy"), None);
    }
    assert_eq!((get(1, "kept attn.q inputs"), get(2, "kept attn.q inputs")), (None, Some(0.75)));
}

#[test]
fn the_table_marks_the_best_plan_and_the_front() {
    let text = table::terminal(&sample());
    let row = |label: &str| text.lines().find(|l| l.starts_with(&format!("| {label}"))).unwrap().to_owned();
    assert!(row("one=0.5").contains("**2.000 (50.0 %)**") && !row("one=0.25").contains("**3.000"), "{text}");
    assert!(row("one=0.25").contains("**1.1250"), "{text}");
    assert!(!row("dense").contains("**"), "the dense model does not compete: {text}");
    assert!(row("two").split('|').nth(2).unwrap().trim().is_empty() && row("one=0.5").contains("yes"));
    assert!(!text.contains("task") && text.contains("note: mind the gap"), "{text}");
    let page = table::markdown(&sample());
    assert!(page.contains("## How to repeat") && page.contains("lacuna run --sparse one=0.5"));
}

#[test]
fn forms_come_from_extensions() {
    assert_eq!(Form::of(Path::new("a.b.JSON")).unwrap(), Form::Json);
    assert!(Form::of(Path::new("report.pdf")).unwrap_err().to_string().contains(".csv"));
    assert!(Form::of(Path::new("report")).is_err());
}

/// Names of the elements that are open at the end, after checking that every one is closed in its order.
fn balanced(page: &str) {
    let empty = ["meta", "link", "br", "path", "rect", "circle"];
    let mut open: Vec<&str> = Vec::new();
    for part in page.split('<').skip(1) {
        let tag = part.split('>').next().unwrap();
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed), "near <{}", &part[..part.len().min(80)]);
        } else if !tag.ends_with('/') && !tag.starts_with('!') && !empty.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn the_page_is_whole_and_escaped_and_asks_for_nothing() {
    let page = html::page(&sample());
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(&#39;x&#39;)"), "{page}");
    for outside in ["http:", "https:", "//", "src=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("Content-Security-Policy"));
    balanced(&page);
    assert!(!page.contains("NaN") && !page.contains("inf "), "{page}");
}

#[test]
fn charts_show_every_point_once_and_can_be_reached_by_keys() {
    let page = html::page(&sample());
    for chart in ["bytes", "time"] {
        for i in 0..4 {
            assert_eq!(page.matches(&format!("<g id=\"{chart}-{i}\"")).count(), 1);
            assert_eq!(page.matches(&format!("<g id=\"{chart}-t{i}\"")).count(), 1);
        }
    }
    assert_eq!(page.matches("class=\"dot").count(), page.matches("tabindex=\"0\" role=\"img\"").count());
    assert_eq!(page.matches("class=\"heat\"").count(), 3);
    let untimed = Report {
        dense: Point { speed: None, ..sample().dense },
        points: sample().points.into_iter().map(|p| Point { speed: None, ..p }).collect(),
        ..sample()
    };
    let page = html::page(&untimed);
    assert!(page.contains("id=\"bytes\"") && !page.contains("id=\"time\""));
    balanced(&page);
}

#[test]
fn the_chart_stands_alone() {
    let svg = html::svg(&sample());
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("http").count(), 1, "the name space and nothing else");
    assert_eq!(svg.matches("<g id=\"bytes-").count(), 8);
    balanced(&svg);
}
