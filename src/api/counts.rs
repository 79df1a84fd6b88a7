//! Requests by endpoint, under the names that Firecracker's metrics have.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::http::Method;
use super::routes::ROUTES;
use crate::telemetry::Figures;

/// What came over the API since it is served.
#[derive(Debug)]
pub struct Counts {
    /// Requests and failures of each of [`ROUTES`].
    routes: Box<[[AtomicU64; 2]]>,
    deprecated: AtomicU64,
    /// Time to the answer, by method.
    durations: Family<[(&'static str, &'static str); 1], Histogram>,
}

/// The shortest bucket is 25 µs, each other four times as long, up to 6.6 s.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(25e-6, 4.0, 10))
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            routes: ROUTES.iter().map(|_| Default::default()).collect(),
            deprecated: AtomicU64::new(0),
            durations: Family::new_with_constructor(histogram),
        }
    }
}

impl Counts {
    /// Counts a request at the endpoint with this index in [`ROUTES`], which took so long.
    pub(super) fn add(&self, route: usize, failed: bool, deprecated: bool, took: Duration) {
        if let Some(route) = ROUTES.get(route) {
            let histogram = self
                .durations
                .get_or_create(&[("method", route.method.name())]);
            histogram.observe(took.as_secs_f64());
        }
        let one = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        if let Some([count, fails]) = self.routes.get(route) {
            one(count);
            if failed {
                one(fails);
            }
        }
        if deprecated {
            one(&self.deprecated);
        }
    }

    /// Adds them to what Prometheus is told.
    pub(super) fn register(&self, registry: &mut Registry) {
        let requests = self.routes.iter().map(|route| {
            route
                .each_ref()
                .map(|counter| counter.load(Ordering::Relaxed))
        });
        registry.register_collector(Box::new(Requests(requests.collect())));
        registry.register_with_unit(
            "api_request_duration",
            "Time from a request to its answer",
            Unit::Seconds,
            self.durations.clone(),
        );
    }

    /// As figures.
    pub fn figures(&self, figures: &mut Figures) {
        for (route, [count, fails]) in ROUTES.iter().zip(&self.routes) {
            let group = match route.method {
                Method::Get => "get_api_requests",
                Method::Put => "put_api_requests",
                Method::Patch => "patch_api_requests",
                Method::Delete => "delete_api_requests",
            };
            let name = name(route.path);
            figures.total(
                group,
                &format!("{name}_count"),
                count.load(Ordering::Relaxed),
            );
            figures.total(
                group,
                &format!("{name}_fails"),
                fails.load(Ordering::Relaxed),
            );
        }
        let deprecated = self.deprecated.load(Ordering::Relaxed);
        figures.total("deprecated_api", "deprecated_http_api_calls", deprecated);
    }
}

/// Requests and failures of each of [`ROUTES`].
#[derive(Debug)]
struct Requests(Vec<[u64; 2]>);

impl Collector for Requests {
    /// Endpoints that nobody asked are left out.
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let families = [
            ("api_requests", "Requests by endpoint"),
            (
                "api_request_failures",
                "Requests that were refused, by endpoint",
            ),
        ];
        for (at, (name, help)) in families.into_iter().enumerate() {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            let asked = ROUTES
                .iter()
                .zip(&self.0)
                .filter(|(_, [count, _])| *count > 0);
            for (route, counts) in asked {
                let labels = [("method", route.method.name()), ("path", route.path)];
                let count = counts.get(at).copied().unwrap_or_default();
                ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What the metrics call an endpoint.
fn name(path: &str) -> String {
    match path {
        "/" => "instance_info".to_owned(),
        "/version" => "vmm_version".to_owned(),
        "/machine-config" => "machine_cfg".to_owned(),
        "/cpu-config" => "cpu_cfg".to_owned(),
        "/drives/{drive_id}" => "drive".to_owned(),
        "/network-interfaces/{iface_id}" => "network".to_owned(),
        path => {
            let words = path
                .split('/')
                .filter(|s| !s.is_empty() && !s.starts_with('{'));
            words.collect::<Vec<_>>().join("_").replace('-', "_")
        }
    }
}
