{{/* Rules over several values, which a schema cannot word. */}}
{{- define "slipstream.validate" -}}
{{- $needed := addf .Values.preStopSleepSeconds .Values.settings.shutdown_grace_s .Values.settings.drain_timeout_s }}
{{- if le (float64 .Values.terminationGracePeriodSeconds) $needed }}
{{- fail (printf "terminationGracePeriodSeconds is %v; it must be above preStopSleepSeconds + settings.shutdown_grace_s + settings.drain_timeout_s = %v, or queued requests are killed" .Values.terminationGracePeriodSeconds $needed) }}
{{- end }}
{{- $sources := list }}
{{- if .Values.models.existingClaim }}{{ $sources = append $sources "models.existingClaim" }}{{ end }}
{{- if .Values.models.claim.create }}{{ $sources = append $sources "models.claim.create" }}{{ end }}
{{- if .Values.models.image.reference }}{{ $sources = append $sources "models.image.reference" }}{{ end }}
{{- if .Values.models.fetch.uri }}{{ $sources = append $sources "models.fetch.uri" }}{{ end }}
{{- if gt (len $sources) 1 }}
{{- fail (printf "%s are set; set at most one source of models" (join " and " $sources)) }}
{{- end }}
{{- if and .Values.models.image.reference (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "models.image.reference needs Kubernetes 1.31 or later (image volumes); this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and (eq .Values.settings.gpu "require") (eq (int .Values.gpu.count) 0) }}
{{- fail "settings.gpu is \"require\" but gpu.count is 0: the pod would get no GPU and never be ready; set gpu.count to 1 or more" }}
{{- end }}
{{- if and (eq .Values.settings.gpu "off") (gt (int .Values.gpu.count) 0) }}
{{- fail (printf "gpu.count is %d but settings.gpu is \"off\": the GPU would lie idle; set settings.gpu to \"require\" or \"prefer\"" (int .Values.gpu.count)) }}
{{- end }}
{{- if and .Values.models.fetch.uri (not .Values.models.fetch.image) }}
{{- fail "models.fetch.uri is set but models.fetch.image is empty: name an image with Python, fsspec and the file system of the URI, such as s3fs" }}
{{- end }}
{{- if and .Values.cache.enabled (ne .Values.rollout "replace") }}
{{- fail (printf "cache.enabled makes a StatefulSet, which replaces its pods one by one, but rollout is %q; set rollout to \"replace\"" .Values.rollout) }}
{{- end }}
{{- if and .Values.optimizer.models (not (or .Values.models.existingClaim .Values.models.claim.create)) }}
{{- fail "optimizer.models needs a claim to write to; set models.existingClaim or models.claim.create" }}
{{- end }}
{{- if and .Values.optimizer.models (not .Values.optimizer.source.existingClaim) }}
{{- fail "optimizer.models needs the claim that holds the ONNX files; set optimizer.source.existingClaim" }}
{{- end }}
{{- if and .Values.models.fetch.uri .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) }}
{{- fail "models.fetch.uri is set but networkPolicy.egress is empty, so the init container reaches no storage; allow DNS and the storage there" }}
{{- end }}
{{- range $name := list "autoscaling" "keda" }}
{{- $scaler := index $.Values $name }}
{{- if and $scaler.enabled (gt (int $scaler.minReplicas) (int $scaler.maxReplicas)) }}
{{- fail (printf "%s.minReplicas is %d, above %s.maxReplicas, which is %d" $name (int $scaler.minReplicas) $name (int $scaler.maxReplicas)) }}
{{- end }}
{{- end }}
{{- end }}
