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

{{- define "slipstream.optimizerImage" -}}
{{- $image := .Values.optimizer.image }}
{{- if $image.digest }}
{{- printf "%s@%s" (default .Values.image.repository $image.repository) $image.digest }}
{{- else }}
{{- printf "%s:%s" (default .Values.image.repository $image.repository) (default (printf "%s-optimizer" .Chart.AppVersion) $image.tag) }}
{{- end }}
{{- end }}

{{- define "slipstream.claimName" -}}
{{- default (include "slipstream.suffixed" (list . "-models")) .Values.models.existingClaim }}
{{- end }}

{{/* A name of at most 63 characters with a suffix: (list . "-suffix"). */}}
{{- define "slipstream.suffixed" -}}
{{- $suffix := index . 1 }}
{{- printf "%s%s" (include "slipstream.fullname" (index . 0) | trunc (int (sub 63 (len $suffix))) | trimSuffix "-") $suffix }}
{{- end }}

{{/* Labels of pods that are not servers, so that the Service sends them nothing: (list . "component"). */}}
{{- define "slipstream.helperLabels" -}}
{{- $component := index . 1 -}}
{{- with index . 0 -}}
app.kubernetes.io/name: {{ include "slipstream.name" . | trunc (int (sub 62 (len $component))) | trimSuffix "-" }}-{{ $component }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- end }}

{{- define "slipstream.url" -}}
http://{{ include "slipstream.fullname" . }}.{{ .Release.Namespace }}.svc:{{ .Values.service.port }}
{{- end }}

{{/* StatefulSet where each pod keeps a cache volume of its own, Deployment otherwise. */}}
{{- define "slipstream.workloadKind" -}}
{{- ternary "StatefulSet" "Deployment" .Values.cache.enabled }}
{{- end }}

{{/* A setting as text. Helm reads YAML numbers as float64, which would print 67108864 as 6.7108864e+07. */}}
{{- define "slipstream.settingText" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}
{{- printf "%d" (int64 .) }}
{{- else }}
{{- toString . }}
{{- end }}
{{- end }}

{{/* GPUs are an extended resource: given as a limit, Kubernetes sets the request itself: (list RESOURCES GPU). */}}
{{- define "slipstream.resources" -}}
{{- $resources := deepCopy (index . 0) }}
{{- $gpu := index . 1 }}
{{- if gt (int $gpu.count) 0 }}
{{- $limits := merge (dict $gpu.resourceName (int $gpu.count)) (default dict $resources.limits) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* What every pod of the chart has in common. */}}
{{- define "slipstream.podBasics" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
serviceAccountName: {{ include "slipstream.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service named "slipstream" would otherwise put SLIPSTREAM_PORT=tcp://... into the environment, which the
# server reads as its setting "port".
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end }}

{{- define "slipstream.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmp.sizeLimit }}
{{- end }}

{{- define "slipstream.scriptsVolume" -}}
- name: scripts
  configMap:
    name: {{ include "slipstream.suffixed" (list . "-scripts") }}
{{- end }}

{{/* Matcher of this release's series, by the labels that the ServiceMonitor adds. */}}
{{- define "slipstream.metricSelector" -}}
{namespace="{{ .Release.Namespace }}",service="{{ include "slipstream.fullname" . }}"}
{{- end }}

{{/* The same with one matcher more: (list . MATCHER). */}}
{{- define "slipstream.metricMatch" -}}
{{- include "slipstream.metricSelector" (index . 0) | trimSuffix "}" }},{{ index . 1 }}}
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
