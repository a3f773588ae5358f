{{- define "slipstream.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "slipstream.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "slipstream.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "slipstream.selectorLabels" -}}
app.kubernetes.io/name: {{ include "slipstream.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "slipstream.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "slipstream.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The chart's labels win over podLabels: the Service and the Deployment select by them. */}}
{{- define "slipstream.podLabels" -}}
{{- toYaml (merge (fromYaml (include "slipstream.labels" .)) .Values.podLabels) }}
{{- end }}

{{- define "slipstream.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "slipstream.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "slipstream.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- $flavour := ternary "-gpu" "" (gt (int .Values.gpu.count) 0) }}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s%s" .Chart.AppVersion $flavour) .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "slipstream.claimName" -}}
{{- default (printf "%s-models" (include "slipstream.fullname" . | trunc 56 | trimSuffix "-")) .Values.models.existingClaim }}
{{- end }}

{{/* A setting as text. Helm reads YAML numbers as float64, which would print 67108864 as 6.7108864e+07. */}}
{{- define "slipstream.settingText" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}
{{- printf "%d" (int64 .) }}
{{- else }}
{{- toString . }}
{{- end }}
{{- end }}

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
{{- end }}

{{/* GPUs are an extended resource: given as a limit, Kubernetes sets the request itself. */}}
{{- define "slipstream.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if gt (int .Values.gpu.count) 0 }}
{{- $limits := merge (dict .Values.gpu.resourceName (int .Values.gpu.count)) (default dict $resources.limits) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "slipstream.modelVolume" -}}
{{- if or .Values.models.existingClaim .Values.models.claim.create -}}
persistentVolumeClaim:
  claimName: {{ include "slipstream.claimName" . }}
{{- else if .Values.models.image.reference -}}
image:
  reference: {{ .Values.models.image.reference | quote }}
  pullPolicy: {{ .Values.models.image.pullPolicy }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .Values.models.emptyDir.sizeLimit }}
{{- end }}
{{- end }}
